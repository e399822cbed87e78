/* The C interface of the native core: raw pointers, sizes, strides and a thread count; no torch, no Python.
 *
 * Every function returns a status; fssa_last_error() then says, for the calling thread, which argument was wrong, what was
 * expected and what came. Nothing is written before the arguments have been checked. The ops' semantics are those of
 * fssa_fast/ops. Products and sums are accumulated in float32 whatever the dtype, and the order of summation of an
 * output element depends on widths alone: not on the number of rows, nor on the threads.
 *
 * A matrix is a pointer and the distance of its rows, in elements; the elements of a row are neighbours. */
#ifndef FSSA_H
#define FSSA_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define FSSA_API __attribute__((visibility("default")))
#else
#define FSSA_API
#endif

typedef enum {
  FSSA_OK = 0,
  FSSA_BAD_VALUE = 1,   /* an argument's value */
  FSSA_BAD_INDEX = 2,   /* a slot outside the bank */
  FSSA_NO_MEMORY = 3,   /* scratch memory could not be had */
  FSSA_UNSUPPORTED = 4, /* the machine cannot do it */
} fssa_status;

typedef enum { FSSA_FLOAT32 = 0, FSSA_BFLOAT16 = 1, FSSA_FLOAT16 = 2 } fssa_dtype;

typedef enum { FSSA_INNER_LINEAR = 0, FSSA_INNER_MLP = 1 } fssa_inner;
typedef enum { FSSA_POOL_ATTENTION = 0, FSSA_POOL_MEAN = 1, FSSA_POOL_SUM = 2 } fssa_pooling;

typedef struct {
  const void *data;
  int64_t stride;
} fssa_input;

typedef struct {
  void *data;
  int64_t stride;
} fssa_output;

/* Row n of a batch belongs to slot data[n / rows_per_slot], which must be in [0, limit). */
typedef struct {
  const void *data;
  int32_t is_int64; /* int64, else int32 */
  int64_t count;
  int64_t rows_per_slot;
  int64_t limit;
} fssa_slots;

/* What film does to a row: x * (1 + scale[slot]) + shift[slot]. */
typedef struct {
  fssa_input scale, shift;
} fssa_film;

/* weight * x / sqrt(mean(x^2) + eps) */
typedef struct {
  const void *weight;
  float eps;
} fssa_norm;

/* What an adapter does to a row of hidden: gamma[slot] * hidden + beta[slot]. */
typedef struct {
  fssa_input gamma, beta;      /* beta.data NULL: zeros */
  int64_t gamma_column_stride; /* 1, or 0 where a row of gamma is one number */
} fssa_modulation;

/* y = film(x) */
typedef struct {
  fssa_dtype dtype;
  int64_t rows, width;
  fssa_input x;
  fssa_film film;
  fssa_slots slots;
  fssa_output y;
  int32_t threads;
} fssa_film_args;

/* hidden = film(residual + x), normed = norm(hidden) */
typedef struct {
  fssa_dtype dtype;
  int64_t rows, width;
  fssa_input x, residual;
  fssa_film film;
  fssa_slots slots;
  fssa_norm norm;
  fssa_output hidden, normed;
  int32_t threads;
} fssa_film_norm_args;

/* dscale and dshift have `slots.limit` rows, all written: zeros where no row of the batch has the slot. */
typedef struct {
  fssa_dtype dtype;
  int64_t rows, width;
  fssa_input grad, x, scale;
  fssa_slots slots;
  fssa_output dx, dscale, dshift;
  int32_t threads;
} fssa_film_backward_args;

typedef struct {
  fssa_output dx, dscale, dshift;
  void *dweight;
} fssa_film_norm_gradients;

typedef struct {
  fssa_dtype dtype;
  int64_t rows, width;
  fssa_input grad_hidden, grad_normed, x, residual;
  fssa_film film;
  fssa_slots slots;
  fssa_norm norm;
  fssa_film_norm_gradients gradients;
  int32_t threads;
} fssa_film_norm_backward_args;

/* One projection of lora: out = y + scaling * hidden b, b [rank, width]. out.data may be y.data. */
typedef struct {
  int64_t rank, width;
  fssa_input y, b;
  fssa_output out;
} fssa_lora_part;

/* hidden = modulation(x a^T), a [sum of ranks, width]. */
typedef struct {
  fssa_dtype dtype;
  int64_t rows, width;
  fssa_input x, a;
  fssa_modulation modulation;
  fssa_slots slots;
  float scaling;
  const fssa_lora_part *parts;
  int64_t part_count;
  int32_t threads;
} fssa_lora_args;

typedef struct {
  int64_t rank, width;
  fssa_input grad, b;
  fssa_output db;
} fssa_lora_backward_part;

/* dgamma and dbeta have `slots.limit` rows, all written. */
typedef struct {
  fssa_output dx, da, dgamma, dbeta;
} fssa_lora_gradients;

typedef struct {
  fssa_dtype dtype;
  int64_t rows, width;
  fssa_input x, a;
  fssa_modulation modulation;
  fssa_slots slots;
  float scaling;
  const fssa_lora_backward_part *parts;
  int64_t part_count;
  fssa_lora_gradients gradients;
  int32_t threads;
} fssa_lora_backward_args;

/* The weights of a context encoder, each contiguous; NULL where the kind of encoder has none. */
typedef struct {
  const void *inner0, *inner0_bias;                      /* [H, 2E] */
  const void *inner1, *inner1_bias;                      /* [H, H] */
  const void *qkv, *qkv_bias;                            /* [3H, H] */
  const void *out, *out_bias;                            /* [H, H] */
  const void *outer0, *outer0_bias;                      /* [H, H] */
  const void *outer1, *outer1_bias;                      /* [Z, H] */
} fssa_context_weights;

/* An encoder's widths and kind. */
typedef struct {
  int64_t embedding_width, latent_width, encoded_width, heads; /* E, H, Z */
  fssa_inner inner;
  fssa_pooling pooling;
} fssa_context_encoder;

/* What is encoded: pairs [N, 2, E], contiguous; user u has the pairs offsets[u] .. offsets[u + 1]. */
typedef struct {
  fssa_dtype dtype;
  int64_t pair_count, users; /* N, U */
  fssa_context_encoder encoder;
  const void *pairs;
  const int64_t *choices, *offsets;
  fssa_context_weights weights;
  int32_t threads;
} fssa_context_input;

typedef struct {
  fssa_context_input input;
  void *encoded; /* [U, Z] */
} fssa_context_args;

typedef struct {
  fssa_context_input input;
  fssa_dtype bank_dtype;
  fssa_output bank; /* [slots.limit, bank_width] */
  int64_t bank_width;
  fssa_slots slots; /* one a user, all different */
  const void *modulation, *modulation_bias; /* [bank_width, H] */
  const void *noise;                        /* [U, H] or NULL */
  void *latents;                            /* [U, H] */
} fssa_context_rows_args;

/* A weight's gradient has the weight's name, shape and dtype. */
typedef struct {
  void *inner0, *inner0_bias, *inner1, *inner1_bias, *qkv, *qkv_bias, *out, *out_bias;
  void *outer0, *outer0_bias, *outer1, *outer1_bias;
} fssa_context_gradients;

typedef struct {
  fssa_context_input input;
  const void *grad; /* [U, Z] */
  void *dpairs;     /* [N, 2, E] */
  fssa_context_gradients gradients;
} fssa_context_backward_args;

/* y = x W^T + bias. The weight lies in panels of 32 outputs, [ceil(outputs / 32)][width][32], in bfloat16 with two of a
 * row side by side, [ceil(outputs / 32)][ceil(width / 2)][32][2]; zeros where there is nothing. bias [outputs] or NULL. */
typedef struct {
  fssa_dtype dtype;
  int64_t rows, width, outputs;
  fssa_input x;
  const void *weight, *bias;
  fssa_output y;
  int32_t threads;
} fssa_linear_args;

/* One adapter whose product with A is known: y += modulation(hidden) b. b [rank, width] lies in panels, as linear's
 * weight, and contains the adapter's scaling. */
typedef struct {
  int64_t rank, width;
  fssa_input hidden;
  fssa_modulation modulation;
  const void *b;
  fssa_output y;
} fssa_adapt_part;

typedef struct {
  fssa_dtype dtype;
  int64_t rows;
  fssa_slots slots;
  const fssa_adapt_part *parts;
  int64_t part_count;
  int32_t threads;
} fssa_adapt_args;

typedef enum { FSSA_SILU = 0, FSSA_GELU_TANH = 1 } fssa_activation;

/* y = activation(gate) * up */
typedef struct {
  fssa_dtype dtype;
  fssa_activation activation;
  int64_t rows, width;
  fssa_input gate, up;
  fssa_output y;
  int32_t threads;
} fssa_gate_args;

/* Attention's heads: `heads` of queries share, in groups, `kv_heads` of keys and values. head_width is even. */
typedef struct {
  int64_t heads, kv_heads, head_width;
} fssa_heads;

/* The tokens that attend: their queries, keys and values, and where in which sequence each stands. */
typedef struct {
  int64_t count;
  fssa_input q, k, v;
  const int32_t *positions, *sequences;
} fssa_tokens;

/* What is done to queries and keys: a norm of each head, of a NULL weight none, and the rotation by the position. */
typedef struct {
  const void *q_norm, *k_norm;
  float eps;
  const float *cos, *sin; /* [positions, head_width] */
  int64_t positions;
} fssa_rotary;

/* Keys and values in blocks of 32 positions: keys [blocks][kv_heads][head_width][32], values [blocks][kv_heads][32]
 * [head_width], in bfloat16 keys [..][head_width / 2][32][2] and values [..][16][head_width][2], 64 readable elements
 * behind the last. Position p of sequence s lies in block table[s][p / 32]. */
typedef struct {
  void *keys, *values;
  int64_t blocks;
  const int32_t *table;
  int64_t sequences, table_stride; /* rows and columns of the table */
} fssa_block_cache;

/* How a score is made of a product; a softcap of 0 is none, and a window of 0 lets all be seen. */
typedef struct {
  float scale, softcap;
  int64_t window;
} fssa_scores;

/* Of every token the rotary query and key, the write of key and value into the cache, and then attention over what the
 * cache holds of the token's sequence, up to and with the token itself. */
typedef struct {
  fssa_dtype dtype;
  fssa_heads heads;
  fssa_tokens tokens;
  fssa_rotary rotary;
  fssa_block_cache cache;
  fssa_scores scores;
  fssa_output out; /* [tokens, heads * head_width] */
  int32_t threads;
} fssa_attention_args;

/* The next token of every row, as fssa_fast/generation/sampling.py draws it, -1 where the highest logit is not finite.
 * Logits are finite or -inf. A row's knobs are at its slot; positions are those of the tokens before. */
typedef struct {
  fssa_dtype dtype;
  int64_t rows, width; /* width in [1, 2^19] */
  fssa_input logits;
  fssa_slots slots;
  const float *temperature, *min_p;
  const int32_t *top_k;
  const double *top_p;
  const int64_t *seed;
  const int32_t *positions; /* [rows] */
  int64_t *tokens;          /* [rows] */
  int32_t threads;
} fssa_sample_args;

FSSA_API const char *fssa_last_error(void);

/* The bytes of a struct of this interface, by its name, or -1: who declares the structs anew can see that he has them as the
 * library has. */
FSSA_API int64_t fssa_size_of(const char *name);

/* The instruction set that the CPU ops use: "scalar", "avx2", "avx512" or "avx512_bf16". The best that the machine has, unless the
 * environment variable FSSA_CPU_ISA or fssa_set_cpu_isa says otherwise. */
FSSA_API fssa_status fssa_cpu_isa(const char **name);
FSSA_API fssa_status fssa_set_cpu_isa(const char *name);
FSSA_API fssa_status fssa_cpu_isa_supported(const char *name, int32_t *supported);

FSSA_API fssa_status fssa_cpu_film(const fssa_film_args *args);
FSSA_API fssa_status fssa_cpu_film_norm(const fssa_film_norm_args *args);
FSSA_API fssa_status fssa_cpu_film_backward(const fssa_film_backward_args *args);
FSSA_API fssa_status fssa_cpu_film_norm_backward(const fssa_film_norm_backward_args *args);
FSSA_API fssa_status fssa_cpu_lora(const fssa_lora_args *args);
FSSA_API fssa_status fssa_cpu_lora_backward(const fssa_lora_backward_args *args);
FSSA_API fssa_status fssa_cpu_context(const fssa_context_args *args);
FSSA_API fssa_status fssa_cpu_context_rows(const fssa_context_rows_args *args);
FSSA_API fssa_status fssa_cpu_context_backward(const fssa_context_backward_args *args);
FSSA_API fssa_status fssa_cpu_linear(const fssa_linear_args *args);
FSSA_API fssa_status fssa_cpu_adapt(const fssa_adapt_args *args);
FSSA_API fssa_status fssa_cpu_gate(const fssa_gate_args *args);
FSSA_API fssa_status fssa_cpu_attention(const fssa_attention_args *args);
FSSA_API fssa_status fssa_cpu_sample(const fssa_sample_args *args);

#ifdef __cplusplus
}
#endif

#endif
