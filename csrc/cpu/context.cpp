// context: users are taken some at a time, their pairs as the rows of plain matrix products. Of the attention only the
// column sums of its softmax are needed: pooled = W_o sum_j (sum_i p_ij) v_j + K b_o, the projection once a user. A linear
// inner encoder whose output is only summed needs only the sum of its input: sum_k (W x_k + b) = W sum_k x_k + K b.
#include <math.h>

#include "matmul.h"
#include "ops.h"
#include "slots.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

constexpr int64_t CHUNK_PAIRS = 2048;          // users are taken together up to so many pairs, or one by one,
constexpr int64_t CHUNK_USERS = 256;           // and so many users
constexpr int64_t SUM_ROWS = 16;               // pairs that are summed before they join the sum of those before them
constexpr int64_t QUERY_ROWS = AXPY_ROWS;      // queries whose scores are held at a time
constexpr int64_t PADDING = AXPY_WIDTH + 16;   // keeps the rows of a transposed matrix off the same cache lines

struct Chunk {
  int64_t first_user, users, first_pair, pairs;
};

// The embeddings of what was chosen (which 0) or rejected (which 1), found where they lie.
template <class T>
struct Option {
  const T *pairs;
  const int64_t *choices;
  int64_t width, which;
  int64_t stride = 0;  // the rows have none
  int64_t index(int64_t pair) const { return (2 * pair + (choices[pair] ^ which)) * width; }
  const T *operator()(int64_t pair) const { return pairs + index(pair); }
};

// out[m, n] = finish(m, n, sum over xs of sum_k x(m)[k] w(n)[k]): the xs' widths, `depth` each, lie side by side in w.
template <class T, class Finish, class... XRows>
void linear(int threads, int64_t rows, const T *w, int64_t columns, int64_t depth, float *out, const Finish &finish,
            const XRows &...xs) {
  const int64_t stride = depth * sizeof...(xs);
  const Pieces pieces(rows, columns, stride, threads);
  parallel(threads, pieces.tasks, [&](int64_t task) {
    const int64_t m = task / pieces.across * pieces.rows, n = task % pieces.across * pieces.columns;
    const int64_t height = lesser(pieces.rows, rows - m), width = lesser(pieces.columns, columns - n);
    int64_t part = 0;
    (
        [&](const auto &x) {
          const Rows<T> weights{w + n * stride + part * depth, stride};
          dots([&](int64_t i) { return x(m + i); }, height, weights, width, depth, out + m * columns + n, columns, part > 0);
          part++;
        }(xs),
        ...);
    for (int64_t i = m; i < m + height; i++) {
      for (int64_t j = n; j < n + width; j += WIDTH) {
        const int64_t count = n + width - j;
        store_up_to(out + i * columns + j, finish(i, j, load_up_to(out + i * columns + j, count), count), count);
      }
    }
  });
}

// The queries, keys and values of one head of one user, and its scratch.
struct Head {
  const float *q, *k, *v;
  int64_t stride, count, width, padded;
  float scale;
  float *keys;    // the keys transposed, [width, padded]: a query's scores are then sums of rows, vectors of many keys
  float *scores;  // [QUERY_ROWS, padded]

  Head(Scratch &scratch, const float *qkv, int64_t latent, int64_t heads, int64_t head, int64_t count_)
      : q(qkv + head * (latent / heads)), k(q + latent), v(k + latent), stride(3 * latent), count(count_),
        width(latent / heads), padded((count_ + AXPY_WIDTH - 1) / AXPY_WIDTH * AXPY_WIDTH + PADDING),
        scale(1.0f / sqrtf(static_cast<float>(width))), keys(scratch.floats(width * padded)),
        scores(scratch.floats(QUERY_ROWS * padded)) {
    memset(keys, 0, width * padded * sizeof(float));
    for (int64_t j = 0; j < count; j++) {
      for (int64_t d = 0; d < width; d++) keys[d * padded + j] = k[j * stride + d];
    }
  }

  int64_t end() const { return padded - PADDING; }

  // The softmax of the queries from `first` on, in `scores`; returns their number. What is beyond `count` is not zero.
  int64_t softmax(int64_t first) {
    const int64_t rows = lesser(QUERY_ROWS, count - first);
    axpys(Grid{q + first * stride, stride, 1}, rows, width, Rows<float>{keys, padded}, 0, end(),
          Into{scores, padded, false});
    for (int64_t i = 0; i < rows; i++) {
      float *row = scores + i * padded;
      for (int64_t j = count; j < end(); j++) row[j] = -INFINITY;
      // The highest score is subtracted first: e^x cannot overflow then, and the sum is at least 1.
      Vec top = splat(-INFINITY);
      for (int64_t j = 0; j < end(); j += WIDTH) top = max(top, load(row + j));
      const Vec highest = splat(largest(top));
      Vec total = splat(0.0f);
      for (int64_t j = 0; j < end(); j += WIDTH) {
        const Vec p = exp_nonpositive((load(row + j) - highest) * splat(scale));
        store(row + j, p);
        total = total + p;
      }
      const Vec inverse = splat(1.0f / sum(total));
      for (int64_t j = 0; j < end(); j += WIDTH) store(row + j, load(row + j) * inverse);
    }
    return rows;
  }
};

struct Activations {
  float *sums;     // [users, 2E]: of the pairs, chosen and rejected, where they are summed first; then no first, inner
  float *first;    // [pairs, H]: of the inner encoder's first layer, after its ReLU where it has one
  float *inner;    // [pairs, H]: of the inner encoder
  float *qkv;      // [pairs, 3H]
  float *attended; // [users, H]: sum_j (sum_i p_ij) v_j
  float *pooled;   // [users, H]
  float *outer;    // [users, H]: of the outer encoder's first layer, after its ReLU
  float *encoded;  // [users, Z]
};

template <class T>
struct Encoder {
  const fssa_context_input &in;
  const int64_t latent = in.encoder.latent_width, width = in.encoder.embedding_width;
  const bool mlp = in.encoder.inner == FSSA_INNER_MLP, attention = in.encoder.pooling == FSSA_POOL_ATTENTION;
  const bool sums_first = !mlp && !attention;

  static const T *typed(const void *data) { return static_cast<const T *>(data); }

  Option<T> option(const Chunk &chunk, int64_t which) const {
    return {typed(in.pairs) + chunk.first_pair * 2 * width, in.choices + chunk.first_pair, width, which};
  }
  int64_t pair_count(int64_t user) const { return in.offsets[user + 1] - in.offsets[user]; }
  // What a user's sum over pairs is multiplied by.
  float share(int64_t user) const {
    return in.encoder.pooling == FSSA_POOL_MEAN ? 1.0f / static_cast<float>(greater(pair_count(user), 1)) : 1.0f;
  }

  template <class Body>
  void for_chunks(const Body &body) const {
    for (int64_t user = 0; user < in.users;) {
      Chunk chunk{user, 0, in.offsets[user], 0};
      do {
        chunk.pairs += pair_count(user++);
        chunk.users++;
      } while (user < in.users && chunk.users < CHUNK_USERS && chunk.pairs + pair_count(user) <= CHUNK_PAIRS);
      body(chunk);
    }
  }

  Activations activations(Scratch &scratch, const Chunk &chunk) const {
    Activations a{};
    if (sums_first) {
      a.sums = scratch.floats(chunk.users * 2 * width);
    } else {
      a.first = scratch.floats(chunk.pairs * latent);
      a.inner = mlp ? scratch.floats(chunk.pairs * latent) : a.first;
    }
    if (attention) a.qkv = scratch.floats(chunk.pairs * 3 * latent);
    a.pooled = scratch.floats(chunk.users * latent);
    a.attended = attention ? scratch.floats(chunk.users * latent) : a.pooled;
    a.outer = scratch.floats(chunk.users * latent);
    a.encoded = scratch.floats(chunk.users * in.encoder.encoded_width);
    return a;
  }

  void layer(const float *x, int64_t rows, const void *w, const void *bias, int64_t columns, bool relu, float *out) const {
    linear(
        in.threads, rows, typed(w), columns, latent, out,
        [&](int64_t, int64_t n, Vec v, int64_t count) {
          v = v + load_up_to(typed(bias) + n, count);
          return relu ? max(splat(0.0f), v) : v;
        },
        Rows<float>{x, latent});
  }

  // body(user of the chunk, head, its first pair in the chunk, its pairs), by all threads.
  template <class Body>
  void for_heads(const Chunk &chunk, const Body &body) const {
    parallel(in.threads, chunk.users * in.encoder.heads, [&](int64_t task) {
      const int64_t user = task / in.encoder.heads;
      const int64_t first = in.offsets[chunk.first_user + user] - chunk.first_pair;
      body(user, task % in.encoder.heads, first, pair_count(chunk.first_user + user));
    });
  }

  // The sums of the pairs as they are, and the inner encoder of these.
  void pool_sums(const Chunk &chunk, const Activations &a) const {
    parallel(in.threads, chunk.users * 2, [&](int64_t task) {
      const int64_t user = task / 2, which = task % 2;
      const Option<T> x = option(chunk, which);
      const int64_t first = in.offsets[chunk.first_user + user] - chunk.first_pair;
      const int64_t end = first + pair_count(chunk.first_user + user);
      float *sum = a.sums + (2 * user + which) * width;
      memset(sum, 0, width * sizeof(float));
      for (int64_t pair = first; pair < end; pair += SUM_ROWS) {
        for (int64_t n = 0; n < width; n += WIDTH) {
          const int64_t count = width - n;
          Vec block = splat(0.0f);
          for (int64_t k = pair; k < lesser(pair + SUM_ROWS, end); k++) block = block + load_up_to(x(k) + n, count);
          store_up_to(sum + n, load_up_to(sum + n, count) + block, count);
        }
      }
    });
    linear(
        in.threads, chunk.users, typed(in.weights.inner0), latent, 2 * width, a.pooled,
        [&](int64_t user, int64_t n, Vec v, int64_t count) {
          const float pairs = static_cast<float>(pair_count(chunk.first_user + user));
          v = fma(splat(pairs), load_up_to(typed(in.weights.inner0_bias) + n, count), v);
          return v * splat(share(chunk.first_user + user));
        },
        Rows<float>{a.sums, 2 * width});
  }

  void pool(const Chunk &chunk, const Activations &a) const {
    if (!attention) {
      parallel(in.threads, chunk.users, [&](int64_t user) {
        float *pooled = a.pooled + user * latent;
        const int64_t count = pair_count(chunk.first_user + user);
        const int64_t first = in.offsets[chunk.first_user + user] - chunk.first_pair;
        memset(pooled, 0, latent * sizeof(float));
        add_rows(a.inner + first * latent, latent, count, latent, pooled);
        for (int64_t d = 0; d < latent; d++) pooled[d] *= share(chunk.first_user + user);
      });
      return;
    }
    for_heads(chunk, [&](int64_t user, int64_t head, int64_t first, int64_t count) {
      Scratch scratch;
      Head of(scratch, a.qkv + first * 3 * latent, latent, in.encoder.heads, head, count);
      // Of K x K weights only QUERY_ROWS rows are ever held: they join the column sums and are forgotten.
      float *columns = scratch.floats(of.padded);
      memset(columns, 0, of.padded * sizeof(float));
      for (int64_t query = 0; query < count; query += QUERY_ROWS) {
        add_rows(of.scores, of.padded, of.softmax(query), of.end(), columns);
      }
      axpys(Grid{columns, 0, 1}, 1, count, Rows<float>{of.v, of.stride}, 0, of.width,
            Into{a.attended + user * latent + head * of.width, latent, false});
    });
    linear(
        in.threads, chunk.users, typed(in.weights.out), latent, latent, a.pooled,
        [&](int64_t user, int64_t n, Vec v, int64_t count) {
          const float pairs = static_cast<float>(pair_count(chunk.first_user + user));
          return fma(splat(pairs), load_up_to(typed(in.weights.out_bias) + n, count), v);
        },
        Rows<float>{a.attended, latent});
  }

  void pooled_inner(const Chunk &chunk, const Activations &a) const {
    if (sums_first) return pool_sums(chunk, a);
    const fssa_context_weights &w = in.weights;
    linear(
        in.threads, chunk.pairs, typed(w.inner0), latent, width, a.first,
        [&](int64_t, int64_t n, Vec v, int64_t count) {
          v = v + load_up_to(typed(w.inner0_bias) + n, count);
          return mlp ? max(splat(0.0f), v) : v;
        },
        option(chunk, 0), option(chunk, 1));
    if (mlp) layer(a.first, chunk.pairs, w.inner1, w.inner1_bias, latent, false, a.inner);
    if (attention) layer(a.inner, chunk.pairs, w.qkv, w.qkv_bias, 3 * latent, false, a.qkv);
    pool(chunk, a);
  }

  void forward(const Chunk &chunk, const Activations &a) const {
    const fssa_context_weights &w = in.weights;
    pooled_inner(chunk, a);
    layer(a.pooled, chunk.users, w.outer0, w.outer0_bias, latent, true, a.outer);
    layer(a.outer, chunk.users, w.outer1, w.outer1_bias, in.encoder.encoded_width, false, a.encoded);
  }
};

template <class T>
void store_all(const float *from, int64_t count, T *to) {
  for (int64_t i = 0; i < count; i += WIDTH) store_up_to(to + i, load_up_to(from + i, count - i), count - i);
}

template <class T>
void context_of(const fssa_context_args &a) {
  const Encoder<T> encoder{a.input};
  const int64_t width = a.input.encoder.encoded_width;
  encoder.for_chunks([&](const Chunk &chunk) {
    Scratch scratch;
    const Activations act = encoder.activations(scratch, chunk);
    encoder.forward(chunk, act);
    store_all(act.encoded, chunk.users * width, static_cast<T *>(a.encoded) + chunk.first_user * width);
  });
}

float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

template <class T>
void context_rows_of(const fssa_context_rows_args &a) {
  const Encoder<T> encoder{a.input};
  const SlotOf slot_of{a.slots};
  const int64_t latent = encoder.latent, width = a.input.encoder.encoded_width;
  encoder.for_chunks([&](const Chunk &chunk) {
    Scratch scratch;
    const Activations act = encoder.activations(scratch, chunk);
    encoder.forward(chunk, act);
    float *latents = scratch.floats(chunk.users * latent);
    for (int64_t user = 0; user < chunk.users; user++) {
      const float *encoded = act.encoded + user * width;
      for (int64_t d = 0; d < latent; d++) {
        float z = encoded[d];
        if (a.noise) {
          z += softplus(encoded[latent + d]) * load_one(static_cast<const T *>(a.noise) + (chunk.first_user + user) * latent + d);
        }
        latents[user * latent + d] = z;
      }
    }
    store_all(latents, chunk.users * latent, static_cast<T *>(a.latents) + chunk.first_user * latent);
    // The modulator's rows are many and read once: cut along them only. A task's rows of all users are made in float32
    // and rounded once, into the bank's dtype.
    const int64_t columns = 1024;
    parallel(a.input.threads, (a.bank_width + columns - 1) / columns, [&](int64_t task) {
      const int64_t n = task * columns, count = lesser(columns, a.bank_width - n);
      Scratch inner;
      float *rows = inner.floats(chunk.users * count);
      dots(Rows<float>{latents, latent}, chunk.users,
           Rows<T>{static_cast<const T *>(a.modulation) + n * latent, latent}, count, latent, rows, count);
      for (int64_t user = 0; user < chunk.users; user++) {
        float *row = rows + user * count;
        for (int64_t j = 0; j < count; j += WIDTH) {
          const Vec bias = load_up_to(static_cast<const T *>(a.modulation_bias) + n + j, count - j);
          store_up_to(row + j, load_up_to(row + j, count - j) + bias, count - j);
        }
        const int64_t at = slot_of(chunk.first_user + user) * a.bank.stride + n;
        with_type(a.bank_dtype, [&](auto type) { store_all(row, count, static_cast<decltype(type) *>(a.bank.data) + at); });
      }
    });
  });
}

// ---------------------------------------------------------------- gradients

// A linear layer's gradients, in float32, summed over the chunks.
struct LayerGradient {
  float *weight, *bias;
};

template <class T>
struct Backward {
  const fssa_context_backward_args &args;
  const Encoder<T> encoder{args.input};
  const fssa_context_input &in = args.input;
  const int64_t latent = encoder.latent, width = encoder.width;
  LayerGradient inner0{}, inner1{}, qkv{}, out{}, outer0{}, outer1{};

  static LayerGradient zeros(Scratch &scratch, int64_t rows, int64_t columns) {
    LayerGradient g{scratch.floats(rows * columns), scratch.floats(rows)};
    memset(g.weight, 0, rows * columns * sizeof(float));
    memset(g.bias, 0, rows * sizeof(float));
    return g;
  }

  // weight += dy^T x and bias += the sum of dy's rows, dy [rows, columns].
  template <class XRows>
  void weight_gradient(const float *dy, int64_t rows, int64_t columns, const XRows &x, int64_t depth, float *to,
                       int64_t stride) const {
    axpys_parallel(in.threads, Grid{dy, 1, columns}, columns, rows, x, depth, Into{to, stride, true});
  }
  void layer_gradient(const float *dy, int64_t rows, int64_t columns, const float *x, const LayerGradient &g) const {
    weight_gradient(dy, rows, columns, Rows<float>{x, latent}, latent, g.weight, latent);
    add_rows(dy, columns, rows, columns, g.bias);
  }
  // dx = dy w, dy [rows, columns] and w [columns, H].
  void input_gradient(const float *dy, int64_t rows, int64_t columns, const void *w, float *dx) const {
    axpys_parallel(in.threads, Grid{dy, columns, 1}, rows, columns, Rows<T>{encoder.typed(w), latent}, latent,
                   Into{dx, latent, false});
  }
  // dy <- 0 where the ReLU's result y is 0.
  void through_relu(const float *y, int64_t count, float *dy) const {
    for (int64_t i = 0; i < count; i++) dy[i] = y[i] > 0.0f ? dy[i] : 0.0f;
  }

  // dqkv of the chunk from the gradient by `attended`.
  void attention_backward(const Chunk &chunk, const Activations &act, const float *dattended, float *dqkv) const {
    memset(dqkv, 0, chunk.pairs * 3 * latent * sizeof(float));
    encoder.for_heads(chunk, [&](int64_t user, int64_t head, int64_t first, int64_t count) {
      Scratch scratch;
      Head of(scratch, act.qkv + first * 3 * latent, latent, in.encoder.heads, head, count);
      const float *dsum = dattended + user * latent + head * of.width;
      float *dq = dqkv + first * 3 * latent + head * of.width, *dk = dq + latent, *dv = dk + latent;
      // attended = sum_j columns_j v_j, so by p_ij the gradient is dcolumns_j = dsum . v_j, whatever the query i; through
      // its softmax it becomes p_ij (dcolumns_j - sum_k p_ik dcolumns_k). The weights are computed again, not kept.
      float *columns = scratch.floats(of.padded), *dcolumns = scratch.floats(of.padded);
      memset(columns, 0, of.padded * sizeof(float));
      memset(dcolumns, 0, of.padded * sizeof(float));
      dots(Rows<float>{of.v, of.stride}, count, Rows<float>{dsum, 0}, 1, of.width, dcolumns, 1);
      for (int64_t query = 0; query < count; query += QUERY_ROWS) {
        const int64_t rows = of.softmax(query);
        add_rows(of.scores, of.padded, rows, of.end(), columns);
        for (int64_t i = 0; i < rows; i++) {
          float *p = of.scores + i * of.padded;
          Vec total = splat(0.0f);
          for (int64_t j = 0; j < of.end(); j += WIDTH) total = fma(load(p + j), load(dcolumns + j), total);
          const Vec mean = splat(sum(total)), scale = splat(of.scale);
          for (int64_t j = 0; j < of.end(); j += WIDTH) store(p + j, load(p + j) * (load(dcolumns + j) - mean) * scale);
        }
        axpys(Grid{of.scores, of.padded, 1}, rows, count, Rows<float>{of.k, of.stride}, 0, of.width,
              Into{dq + query * of.stride, of.stride, false});
        axpys(Grid{of.scores, 1, of.padded}, count, rows, Rows<float>{of.q + query * of.stride, of.stride}, 0, of.width,
              Into{dk, of.stride, true});
      }
      for (int64_t j = 0; j < count; j++) {
        for (int64_t d = 0; d < of.width; d++) dv[j * of.stride + d] = columns[j] * dsum[d];
      }
    });
  }

  // dinner [pairs, H] from dpooled [users, H].
  void pool_backward(const Chunk &chunk, const Activations &act, const float *dpooled, float *dinner) const {
    if (!encoder.attention) {
      for (int64_t user = 0; user < chunk.users; user++) {
        const int64_t count = encoder.pair_count(chunk.first_user + user);
        const int64_t first = in.offsets[chunk.first_user + user] - chunk.first_pair;
        const float share = encoder.share(chunk.first_user + user);
        for (int64_t k = first; k < first + count; k++) {
          for (int64_t d = 0; d < latent; d++) dinner[k * latent + d] = dpooled[user * latent + d] * share;
        }
      }
      return;
    }
    Scratch scratch;
    float *dattended = scratch.floats(chunk.users * latent), *dqkv = scratch.floats(chunk.pairs * 3 * latent);
    weight_gradient(dpooled, chunk.users, latent, Rows<float>{act.attended, latent}, latent, out.weight, latent);
    for (int64_t user = 0; user < chunk.users; user++) {
      const float count = static_cast<float>(encoder.pair_count(chunk.first_user + user));
      for (int64_t d = 0; d < latent; d++) out.bias[d] += count * dpooled[user * latent + d];
    }
    input_gradient(dpooled, chunk.users, latent, in.weights.out, dattended);
    attention_backward(chunk, act, dattended, dqkv);
    layer_gradient(dqkv, chunk.pairs, 3 * latent, act.inner, qkv);
    input_gradient(dqkv, chunk.pairs, 3 * latent, in.weights.qkv, dinner);
  }

  // The gradients of the inner encoder where the pairs are summed first: those of a user's pairs are all the same.
  void sums_backward(const Chunk &chunk, const Activations &act, float *dpooled) const {
    for (int64_t user = 0; user < chunk.users; user++) {
      const float count = static_cast<float>(encoder.pair_count(chunk.first_user + user));
      for (int64_t d = 0; d < latent; d++) {
        dpooled[user * latent + d] *= encoder.share(chunk.first_user + user);
        inner0.bias[d] += count * dpooled[user * latent + d];
      }
    }
    weight_gradient(dpooled, chunk.users, latent, Rows<float>{act.sums, 2 * width}, 2 * width, inner0.weight, 2 * width);
    T *dpairs = static_cast<T *>(args.dpairs) + chunk.first_pair * 2 * width;
    for (int64_t which = 0; which < 2; which++) {
      const Option<T> option = encoder.option(chunk, which);
      const Rows<T> w{encoder.typed(in.weights.inner0) + which * width, 2 * width};
      axpys_parallel(in.threads, Grid{dpooled, latent, 1}, chunk.users, latent, w, width,
                     [&](int64_t user, int64_t n, Vec v, int64_t count) {
                       const int64_t *offsets = in.offsets + chunk.first_user + user;
                       for (int64_t pair = offsets[0]; pair < offsets[1]; pair++) {
                         store_up_to(dpairs + option.index(pair - chunk.first_pair) + n, v, count);
                       }
                     });
    }
  }

  void chunk_backward(const Chunk &chunk, const Activations &act) const {
    Scratch scratch;
    const int64_t encoded = in.encoder.encoded_width;
    float *grad = scratch.floats(chunk.users * encoded);
    float *douter = scratch.floats(chunk.users * latent), *dpooled = scratch.floats(chunk.users * latent);
    const T *given = encoder.typed(args.grad) + chunk.first_user * encoded;
    for (int64_t i = 0; i < chunk.users * encoded; i += WIDTH) {
      const int64_t count = chunk.users * encoded - i;
      store_up_to(grad + i, load_up_to(given + i, count), count);
    }
    layer_gradient(grad, chunk.users, encoded, act.outer, outer1);
    input_gradient(grad, chunk.users, encoded, in.weights.outer1, douter);
    through_relu(act.outer, chunk.users * latent, douter);
    layer_gradient(douter, chunk.users, latent, act.pooled, outer0);
    input_gradient(douter, chunk.users, latent, in.weights.outer0, dpooled);
    if (encoder.sums_first) return sums_backward(chunk, act, dpooled);
    float *dinner = scratch.floats(chunk.pairs * latent);
    pool_backward(chunk, act, dpooled, dinner);
    float *dfirst = dinner;
    if (encoder.mlp) {
      dfirst = scratch.floats(chunk.pairs * latent);
      layer_gradient(dinner, chunk.pairs, latent, act.first, inner1);
      input_gradient(dinner, chunk.pairs, latent, in.weights.inner1, dfirst);
      through_relu(act.first, chunk.pairs * latent, dfirst);
    }
    add_rows(dfirst, latent, chunk.pairs, latent, inner0.bias);
    T *dpairs = static_cast<T *>(args.dpairs) + chunk.first_pair * 2 * width;
    for (int64_t which = 0; which < 2; which++) {
      const Option<T> option = encoder.option(chunk, which);
      weight_gradient(dfirst, chunk.pairs, latent, option, width, inner0.weight + which * width, 2 * width);
      const Rows<T> w{encoder.typed(in.weights.inner0) + which * width, 2 * width};
      axpys_parallel(in.threads, Grid{dfirst, latent, 1}, chunk.pairs, latent, w, width,
                     [&](int64_t m, int64_t n, Vec v, int64_t count) {
                       store_up_to(dpairs + option.index(m) + n, v, count);
                     });
    }
  }

  void run() {
    Scratch scratch;
    inner0 = zeros(scratch, latent, 2 * width);
    if (encoder.mlp) inner1 = zeros(scratch, latent, latent);
    if (encoder.attention) {
      qkv = zeros(scratch, 3 * latent, latent);
      out = zeros(scratch, latent, latent);
    }
    outer0 = zeros(scratch, latent, latent);
    outer1 = zeros(scratch, in.encoder.encoded_width, latent);
    encoder.for_chunks([&](const Chunk &chunk) {
      Scratch activations;
      const Activations act = encoder.activations(activations, chunk);
      encoder.forward(chunk, act);
      chunk_backward(chunk, act);
    });
    const auto give = [](const LayerGradient &g, int64_t rows, int64_t columns, void *weight, void *bias) {
      if (!weight) return;
      store_all(g.weight, rows * columns, static_cast<T *>(weight));
      store_all(g.bias, rows, static_cast<T *>(bias));
    };
    const fssa_context_gradients &to = args.gradients;
    give(inner0, latent, 2 * width, to.inner0, to.inner0_bias);
    give(inner1, latent, latent, to.inner1, to.inner1_bias);
    give(qkv, 3 * latent, latent, to.qkv, to.qkv_bias);
    give(out, latent, latent, to.out, to.out_bias);
    give(outer0, latent, latent, to.outer0, to.outer0_bias);
    give(outer1, in.encoder.encoded_width, latent, to.outer1, to.outer1_bias);
  }
};

}  // namespace

void context(const fssa_context_args &a) {
  with_type(a.input.dtype, [&](auto type) { context_of<decltype(type)>(a); });
}

void context_rows(const fssa_context_rows_args &a) {
  with_type(a.input.dtype, [&](auto type) { context_rows_of<decltype(type)>(a); });
}

void context_backward(const fssa_context_backward_args &a) {
  with_type(a.input.dtype, [&](auto type) { Backward<decltype(type)>{a}.run(); });
}

}  // namespace FSSA_ISA
}  // namespace fssa
