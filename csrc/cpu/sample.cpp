// The next token of every row, drawn from its logits: fssa_fast/generation/sampling.py has the definition.
//
// A row is one task, so its token depends on nothing else. Weights are whole numbers up to 2^34, kept in float32, which
// holds each of them exactly once its fraction is cut off, and added in float64, which holds every sum of 2^19 of them
// exactly: the order of addition does not matter.
#include "ops.h"
#include "parallel.h"
#include "vec.h"

FSSA_DECLARE_OPS(FSSA_ISA)

namespace fssa {
namespace FSSA_ISA {
namespace {

constexpr int64_t LANES = 8, BLOCK = 1024;  // of a block of weights only the sum is read, unless the token lies in it
typedef float Floats __attribute__((vector_size(LANES * sizeof(float))));
typedef double Doubles __attribute__((vector_size(LANES * sizeof(double))));
typedef int32_t Ints __attribute__((vector_size(sizeof(Vec))));
typedef float Plain __attribute__((vector_size(sizeof(Vec))));

constexpr float ONE = 17179869184.0f;  // 2^34
constexpr uint32_t ALL = 0x7fffffff;   // no distance is greater
constexpr int FIRST_BITS = 11, NEXT_BITS = 10;

uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

double uniform(uint64_t seed, uint64_t position) {
  constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15u;
  return static_cast<double>(mixed(mixed(seed + GOLDEN) + (position + 1) * GOLDEN) >> 11) * 0x1p-53;
}

// The highest logit; false where it is NaN or infinite.
template <class T>
bool highest_of(const T *logits, int64_t width, float *highest) {
  const float infinity = __builtin_inff();
  Vec top = splat(-infinity);
  Ints not_numbers = {};
  int64_t d = 0;
  for (; d + WIDTH <= width; d += WIDTH) {
    const Vec x = load(logits + d);
    not_numbers |= (Ints)((Plain)x != (Plain)x);
    top = max(top, x);
  }
  float found = largest(top);
  bool numbers = true;
  for (int i = 0; i < WIDTH; i++) numbers &= not_numbers[i] == 0;
  for (; d < width; d++) {
    const float x = load_one(logits + d);
    numbers &= x == x;
    found = x > found ? x : found;
  }
  *highest = found;
  return numbers && found > -infinity && found < infinity;
}

template <class T>
int64_t first_at(const T *logits, int64_t width, float highest) {
  int64_t d = 0;
  for (; d + WIDTH <= width; d += WIDTH) {
    const Ints equal = (Ints)((Plain)load(logits + d) == (Plain)splat(highest));
    Ints none = {};
    if (memcmp(&equal, &none, sizeof(equal)) != 0) break;
  }
  while (d < width && load_one(logits + d) != highest) d++;
  return d;
}

// How far a row's logits lie below the highest, and the weights that follow.
template <class T>
void weigh(const T *logits, int64_t width, float highest, float temperature, float min_p, float *distances,
           float *weights) {
  for (int64_t d = 0; d < width; d += WIDTH) {
    const int64_t count = width - d;
    const Vec below = splat(highest) - load_up_to(logits + d, count);
    const Vec share = exp_nonpositive(splat(0.0f) - below / splat(temperature));
    const Plain scaled = (Plain)(share * splat(ONE)), zero = {};
    const Plain small = scaled < 8388608.0f ? scaled : zero;  // from 2^23 on there is no fraction to cut off
    const Plain cut = __builtin_convertvector(__builtin_convertvector(small, Ints), Plain);
    const Plain whole = scaled < 8388608.0f ? cut : scaled;
    store_up_to(distances + d, below, count);
    store_up_to(weights + d, (Vec)((Plain)share < min_p ? zero : whole), count);
  }
}

double sum_of(const float *weights, int64_t count) {
  Doubles sums = {};
  int64_t d = 0;
  for (; d + LANES <= count; d += LANES) {
    Floats some;
    memcpy(&some, weights + d, sizeof(some));
    sums += __builtin_convertvector(some, Doubles);
  }
  double sum = 0;
  for (int i = 0; i < LANES; i++) sum += sums[i];
  for (; d < count; d++) sum += weights[d];
  return sum;
}

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits;  // of numbers that are not negative: in their order
}

// The least distance up to which a row's weights (or, without weights, its tokens) add up to what is wanted, by its first
// 11 bits, then by 10 more of what has these, then by the last 10. `kept` has room for the row's tokens.
uint32_t least(const float *distances, const float *weights, int64_t width, double wanted, int64_t *kept) {
  double amounts[2][1 << FIRST_BITS];  // two, in turn: neighbours often go to the same place
  uint32_t found = 0;
  int64_t count = width;
  for (int shift = 2 * NEXT_BITS, bits = FIRST_BITS; shift >= 0; shift -= NEXT_BITS, bits = NEXT_BITS) {
    const bool everything = shift == 2 * NEXT_BITS;
    const uint32_t mask = (1u << bits) - 1;
    memset(amounts, 0, sizeof(amounts));
    for (int64_t i = 0; i < count; i++) {
      const int64_t token = everything ? i : kept[i];
      amounts[i & 1][(bits_of(distances[token]) >> shift) & mask] += weights ? weights[token] : 1.0;
    }
    uint32_t place = 0;
    for (; place <= mask; place++) {
      const double amount = amounts[0][place] + amounts[1][place];
      if (amount >= wanted) break;
      wanted -= amount;
    }
    if (place > mask) return ALL;  // not even all of them
    found |= place << shift;
    int64_t left = 0;
    for (int64_t i = 0; i < count; i++) {
      const int64_t token = everything ? i : kept[i];
      kept[left] = token;  // written in any case, and kept or overwritten: no branch to guess
      left += ((bits_of(distances[token]) >> shift) & mask) == place;
    }
    count = left;
  }
  return found;
}

void drop_beyond(uint32_t last, const float *distances, float *weights, int64_t width) {
  for (int64_t d = 0; d < width; d++) weights[d] = bits_of(distances[d]) <= last ? weights[d] : 0.0f;
}

int64_t drawn(const float *weights, int64_t width, double random, double *sums) {
  double total = 0;
  for (int64_t d = 0; d < width; d += BLOCK) {
    total += sums[d / BLOCK] = sum_of(weights + d, lesser(BLOCK, width - d));
  }
  double left = static_cast<double>(static_cast<int64_t>(random * total));
  int64_t token = 0;  // below width whatever the knobs: only with those that Sampling takes is it sure to be drawn right
  for (; token + BLOCK < width && sums[token / BLOCK] <= left; token += BLOCK) left -= sums[token / BLOCK];
  for (; token + 1 < width && weights[token] <= left; token++) left -= weights[token];
  return token;
}

template <class T>
int64_t token_of(const fssa_sample_args &a, int64_t n) {
  const T *logits = static_cast<const T *>(a.logits.data) + n * a.logits.stride;
  const int64_t row = static_cast<const int64_t *>(a.slots.data)[n], width = a.width;
  float highest;
  if (!highest_of(logits, width, &highest)) return -1;
  if (a.temperature[row] == 0) return first_at(logits, width, highest);
  Scratch scratch;
  float *distances = scratch.floats(width), *weights = scratch.floats(width);
  double *sums = reinterpret_cast<double *>(scratch.integers(width / BLOCK + 1));
  weigh(logits, width, highest, a.temperature[row], a.min_p[row], distances, weights);
  const int32_t top_k = a.top_k[row];
  const double top_p = a.top_p[row];
  if ((top_k > 0 && top_k < width) || top_p < 1) {
    int64_t *kept = scratch.integers(width);
    if (top_k > 0 && top_k < width) {
      drop_beyond(least(distances, nullptr, width, top_k, kept), distances, weights, width);
    }
    if (top_p < 1) {
      const double wanted = __builtin_ceil(top_p * sum_of(weights, width));
      drop_beyond(least(distances, weights, width, wanted, kept), distances, weights, width);
    }
  }
  return drawn(weights, width, uniform(a.seed[row], a.positions[n]), sums);
}

}  // namespace

void sample(const fssa_sample_args &a) {
  with_type(a.dtype, [&](auto type) {
    parallel(a.threads, a.rows, [&](int64_t n) { a.tokens[n] = token_of<decltype(type)>(a, n); });
  });
}

}  // namespace FSSA_ISA
}  // namespace fssa
