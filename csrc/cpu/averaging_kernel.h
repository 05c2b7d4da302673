// Averages of gradients, written once and compiled once per instruction set (see averaging_<isa>.cpp).
//
// Products and sums are fp64: squares of small gradients are below what fp32 holds, and all of it stays
// behind the memory.
//
// No include guard and no system headers: the including file chooses namespace, target and SFPK_LANES.

#include "floats_kernel.h"

constexpr int kDoubles = SFPK_LANES / 2;
constexpr int64_t kAhead = 512;  // entries that are on their way to L2 while one is worked on

typedef double Wide __attribute__((vector_size(kDoubles * 8)));

template <class T>
struct LanesOf;
template <>
struct LanesOf<float> {
  typedef float Type __attribute__((vector_size(kDoubles * 4)));
};
template <>
struct LanesOf<double> {
  typedef Wide Type;
};

template <class T>
static inline typename LanesOf<T>::Type lanes_at(const T* p) {
  typename LanesOf<T>::Type v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

struct GradientSums {
  Wide both = {}, squares = {}, average_squares = {}, fourths = {};
};

// What is written: nothing, or the average, computed from the nearer of its two ends, as torch's lerp does
// it.
enum class Writes { kNothing, kFromGradient, kFromAverage };

template <class T, bool kAverages, Writes kWrites>
static inline void add_lanes(T* grads, const T* averages, const T* weights, T share, GradientSums& sums) {
  const auto g = lanes_at(grads);
  const Wide w = __builtin_convertvector(lanes_at(weights), Wide);
  const Wide a = __builtin_convertvector(g, Wide) * w, square = a * a;
  sums.squares += square;
  sums.fourths += square * square;
  if constexpr (kAverages) {
    const auto v = lanes_at(averages);
    const Wide b = __builtin_convertvector(v, Wide) * w;
    sums.both += a * b;
    sums.average_squares += b * b;
    if constexpr (kWrites != Writes::kNothing) {
      const auto average = share * (v - g) + (kWrites == Writes::kFromAverage ? v : g);
      __builtin_memcpy(grads, &average, sizeof average);
    }
  }
}

template <class T, bool kAverages, Writes kWrites>
static void add_columns(T* grads, const T* averages, const T* weights, int64_t count, T share, double* sums) {
  constexpr int64_t kStep = 2 * kDoubles;
  GradientSums one, other;  // two chains of additions at once
  const auto add = [&](T* g, const T* v, const T* w) {
    add_lanes<T, kAverages, kWrites>(g, v, w, share, one);
    add_lanes<T, kAverages, kWrites>(g + kDoubles, kAverages ? v + kDoubles : v, w + kDoubles, share, other);
  };
  int64_t at = 0;
  for (; at + kStep <= count; at += kStep) {
    __builtin_prefetch(grads + at + kAhead, kWrites != Writes::kNothing, 2);
    if constexpr (kAverages) __builtin_prefetch(averages + at + kAhead, 0, 2);
    __builtin_prefetch(weights + at + kAhead, 0, 2);
    add(grads + at, kAverages ? averages + at : averages, weights + at);
  }
  if (at < count) {
    T g[kStep] = {}, v[kStep] = {}, w[kStep] = {};
    const auto bytes = static_cast<size_t>(count - at) * sizeof(T);
    __builtin_memcpy(g, grads + at, bytes);
    if constexpr (kAverages) __builtin_memcpy(v, averages + at, bytes);
    __builtin_memcpy(w, weights + at, bytes);
    add(g, v, w);
    if constexpr (kWrites != Writes::kNothing) __builtin_memcpy(grads + at, g, bytes);
  }
  const Wide all[kGradientSums] = {one.both + other.both, one.squares + other.squares,
                                   one.average_squares + other.average_squares, one.fourths + other.fourths};
  for (int k = 0; k < kGradientSums; ++k)
    for (int lane = 0; lane < kDoubles; ++lane) sums[k] += all[k][lane];
}

template <class T>
static void average_columns(T* grads, const T* averages, const T* weights, int64_t count, double beta,
                            double* sums) {
  const T share = static_cast<T>(beta);
  if (!averages)
    add_columns<T, false, Writes::kNothing>(grads, averages, weights, count, share, sums);
  else if (!(beta > 0.0))
    add_columns<T, true, Writes::kNothing>(grads, averages, weights, count, share, sums);
  else if (share < T(0.5))
    add_columns<T, true, Writes::kFromGradient>(grads, averages, weights, count, share, sums);
  else
    add_columns<T, true, Writes::kFromAverage>(grads, averages, weights, count, share - T(1), sums);
}

void average_piece(const GradientPiece& p, double* sums) {
  if (p.exact) {
    average_columns(static_cast<double*>(p.grads), static_cast<const double*>(p.averages),
                    static_cast<const double*>(p.weights), p.count, p.beta, sums);
    return;
  }
  if (p.kind == FloatKind::kFloat && p.weights_kind == FloatKind::kFloat) {
    average_columns(static_cast<float*>(p.grads), static_cast<const float*>(p.averages),
                    static_cast<const float*>(p.weights), p.count, p.beta, sums);
    return;
  }
  alignas(64) float grads[kAveragingBlock];
  alignas(64) float averages[kAveragingBlock];
  alignas(64) float weights[kAveragingBlock];
  const bool writes = p.averages && p.beta > 0.0, widens = p.kind != FloatKind::kFloat;
  for (int64_t at = 0; at < p.count; at += kAveragingBlock) {
    const int64_t count = p.count - at < kAveragingBlock ? p.count - at : kAveragingBlock;
    char* own = static_cast<char*>(p.grads) + at * bytes_of(p.kind);
    const char* mean = p.averages ? static_cast<const char*>(p.averages) + at * bytes_of(p.kind) : nullptr;
    const char* by = static_cast<const char*>(p.weights) + at * bytes_of(p.weights_kind);
    auto* g = widens ? grads : reinterpret_cast<float*>(own);
    open_floats(own, p.kind, count, g);
    const float* v = mean ? open_floats(mean, p.kind, count, averages) : nullptr;
    average_columns(g, v, open_floats(by, p.weights_kind, count, weights), count, p.beta, sums);
    if (writes && widens) close_floats(g, p.kind, count, own);
  }
}
