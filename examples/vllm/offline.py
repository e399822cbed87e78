"""One prompt, answered by vLLM for several users at once: python -m examples.vllm.offline BASE POLICY STORE NAME..."""

from __future__ import annotations

import sys

from fssa_fast.vllm import BASE, PRIOR, steered_llm, steered_params


def main(base: str, policy: str, store: str, *names: str) -> None:
    users = [*names, PRIOR, BASE]
    llm = steered_llm(base, policy, users=store, max_model_len=512)
    messages = [[{"role": "user", "content": "How do I sleep better?"}]] * len(users)
    answers = llm.chat(messages, [steered_params(user, temperature=0, max_tokens=60) for user in users])
    for user, answer in zip(users, answers, strict=True):
        print(f"{user}: {answer.outputs[0].text.strip()}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
