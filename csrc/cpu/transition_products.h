// Products of a tile of the transition: with an (n, n) matrix, and of its rows with each other.
//
// No include guard and no includes: see transition_kernel.h.

#include "transition_tile.h"

// out[i] = sum_j mix[i][j] * (rows[j] - rows[0]), for R particles i at once.
template <int R>
static void mix_rows(const float* mix, int64_t n, const float* rows, int64_t stride, int64_t width,
                     float* out, int64_t out_stride) {
  for (int64_t v = 0; v < width; v += kStep) {
    const Vec a0 = load(rows + v), b0 = load(rows + v + SFPK_LANES);
    Vec low[R] = {}, high[R] = {};
    for (int64_t j = 1; j < n; ++j) {
      const Vec a = load(rows + j * stride + v) - a0, b = load(rows + j * stride + v + SFPK_LANES) - b0;
      for (int r = 0; r < R; ++r) {
        const float weight = mix[r * n + j];
        low[r] += weight * a;
        high[r] += weight * b;
      }
    }
    for (int r = 0; r < R; ++r) {
      store(out + r * out_stride + v, low[r]);
      store(out + r * out_stride + v + SFPK_LANES, high[r]);
    }
  }
}

// t.force <- the repulsion on every particle (without its weights w).
static void repel(const Problem& p, const Tile& t) {
  if (p.only >= 0) {
    return mix_rows<1>(p.mix + p.only * p.n, p.n, t.masks, t.mask_stride, t.width,
                       t.force + p.only * t.stride, t.stride);
  }
  int64_t i = 0;
  const auto block = [&](auto rows) {
    constexpr int R = decltype(rows)::value;
    for (; i + R <= p.n; i += R)
      mix_rows<R>(p.mix + i * p.n, p.n, t.masks, t.mask_stride, t.width, t.force + i * t.stride, t.stride);
  };
  block(std::integral_constant<int, 5>{});
  block(std::integral_constant<int, 2>{});
  block(std::integral_constant<int, 1>{});
}

// sums[i][j] += x[i] . y[j] for an A x B block of rows.
template <int A, int B>
static void dot_block(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t width,
                      double* sums, int64_t n) {
  Vec acc[A][B] = {};
  for (int64_t v = 0; v < width; v += SFPK_LANES) {
    Vec b[B];
    for (int j = 0; j < B; ++j) b[j] = load(y + j * y_stride + v);
    for (int i = 0; i < A; ++i) {
      const Vec a = load(x + i * x_stride + v);
      for (int j = 0; j < B; ++j) acc[i][j] += a * b[j];
    }
  }
  for (int i = 0; i < A; ++i)
    for (int j = 0; j < B; ++j) sums[i * n + j] += lane_sum(acc[i][j]);
}

// sums (n, n) += x . y^T; `symmetric` leaves out what lies in blocks below the diagonal.
static void gram(const float* x, int64_t x_stride, const float* y, int64_t y_stride, int64_t n, int64_t width,
                 double* sums, bool symmetric) {
  const auto column = [&](auto rows, int64_t i) {
    constexpr int A = decltype(rows)::value;
    int64_t j = symmetric ? i : 0;
    const float* xi = x + i * x_stride;
    for (; j + 4 <= n; j += 4)
      dot_block<A, 4>(xi, x_stride, y + j * y_stride, y_stride, width, sums + i * n + j, n);
    for (; j + 2 <= n; j += 2)
      dot_block<A, 2>(xi, x_stride, y + j * y_stride, y_stride, width, sums + i * n + j, n);
    for (; j < n; ++j) dot_block<A, 1>(xi, x_stride, y + j * y_stride, y_stride, width, sums + i * n + j, n);
  };
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) column(std::integral_constant<int, 4>{}, i);
  for (; i + 2 <= n; i += 2) column(std::integral_constant<int, 2>{}, i);
  for (; i < n; ++i) column(std::integral_constant<int, 1>{}, i);
}
