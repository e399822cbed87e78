// The ops of one instruction set; dispatch.cpp has checked the arguments.
#pragma once

#include "fssa.h"

#define FSSA_DECLARE_OPS(ISA)                                      \
  namespace fssa {                                                 \
  namespace ISA {                                                  \
  void film(const fssa_film_args &);                               \
  void film_norm(const fssa_film_norm_args &);                     \
  void film_backward(const fssa_film_backward_args &);             \
  void film_norm_backward(const fssa_film_norm_backward_args &);   \
  void lora(const fssa_lora_args &);                               \
  void lora_backward(const fssa_lora_backward_args &);             \
  void context(const fssa_context_args &);                         \
  void context_rows(const fssa_context_rows_args &);               \
  void context_backward(const fssa_context_backward_args &);       \
  void linear(const fssa_linear_args &);                           \
  void adapt(const fssa_adapt_args &);                             \
  void gate(const fssa_gate_args &);                               \
  void attention(const fssa_attention_args &);                     \
  void sample(const fssa_sample_args &);                           \
  }                                                                \
  }
