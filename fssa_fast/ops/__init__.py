"""The three ops: context, lora, film. Each file holds an op's definition, schema, autograd and public function."""

from fssa_fast.arguments import ContextWeights
from fssa_fast.ops.context import context, context_rows_, latent_of
from fssa_fast.ops.film import film, film_norm
from fssa_fast.ops.lora import lora, lora_

__all__ = ["ContextWeights", "context", "context_rows_", "film", "film_norm", "latent_of", "lora", "lora_"]
