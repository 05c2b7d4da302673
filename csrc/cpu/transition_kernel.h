// The arithmetic of one tile, written once and compiled once per instruction set (see transition_<isa>.cpp).
//
// A tile is a block of columns of all n particles, small enough that everything after the first touch reads
// the cache; while one tile is worked on, the next one is prefetched. Sums run in fp32 lanes over one tile
// and in fp64 across tiles. Particles stay close to each other, so whatever needs their differences first
// subtracts the tile of particle 0.
//
// No include guard and no system headers, here and in what it includes: the including file chooses namespace,
// target and vector width SFPK_LANES.

#include "transition_products.h"

// Which of the optional vectors a problem has, known to the compiler.
template <bool kWeights, bool kSaliency, bool kSizes>
struct Have {
  static constexpr bool weights = kWeights, saliency = kSaliency, sizes = kSizes;
};

template <class F>
static void with_vectors(const Tile& t, F&& f) {
  const int which = (t.weights ? 1 : 0) + (t.saliency ? 2 : 0) + (t.sizes ? 4 : 0);
  switch (which) {
    case 0:
      f(Have<false, false, false>{});
      break;
    case 1:
      f(Have<true, false, false>{});
      break;
    case 2:
      f(Have<false, true, false>{});
      break;
    case 3:
      f(Have<true, true, false>{});
      break;
    case 4:
      f(Have<false, false, true>{});
      break;
    case 5:
      f(Have<true, false, true>{});
      break;
    case 6:
      f(Have<false, true, true>{});
      break;
    default:
      f(Have<true, true, true>{});
      break;
  }
}

// e = -dL/dm and g = e + w * force at column v.
template <class H>
static inline void descent(const Tile& t, const float* grads, const float* force, int64_t v, Vec& e, Vec& g) {
  e = -load(grads + v);
  if constexpr (H::weights) e *= load(t.weights + v);
  g = e;
  if (!force) return;
  if constexpr (H::saliency) {
    const Vec a = load(t.saliency + v);
    g += a * a * load(force + v);
  } else {
    g += load(force + v);
  }
}

static void scale_rows(const Problem& p, const Tile& t, const float* from, int64_t from_stride, float* to) {
  for (int64_t i = 0; i < p.n; ++i)
    for (int64_t v = 0; v < t.width; v += SFPK_LANES)
      store(to + i * t.stride + v, load(t.sizes + v) * load(from + i * from_stride + v));
}

// Reduce pass, one tile: row sums (kReduceSums per particle), then the Gram matrices if asked for.
static void reduce_tile(const Problem& p, Tile& t, double* sums) {
  if (p.repel) repel(p, t);
  with_vectors(t, [&](auto have) {
    using H = decltype(have);
    for (int64_t i = 0; i < p.n; ++i) {
      if (p.only >= 0 && i != p.only) {
        if (p.grams) std::memset(t.other + i * t.stride, 0, t.width * sizeof(float));
        continue;
      }
      const float *grads = open_grads(p, t, i), *m = t.masks + i * t.mask_stride;
      const float* force = p.repel ? t.force + i * t.stride : nullptr;
      float* keep = p.grams ? t.other + i * t.stride : nullptr;
      const float guess = p.guess[i];
      const Ahead ahead(p, t, i);
      Vec ee = {}, es = {}, eu = {}, uu = {}, us = {}, cuu = {}, csu = {}, css = {};
      for (int64_t v = 0; v < t.width; v += SFPK_LANES) {
        ahead.fetch(v);
        Vec e, u;
        descent<H>(t, grads, force, v, e, u);
        Vec s = load(m + v);
        if constexpr (H::sizes) s *= load(t.sizes + v);
        u -= guess * s;
        if (keep) store(keep + v, u);
        ee += e * e;
        es += e * s;
        eu += e * u;
        uu += u * u;
        us += u * s;
        if constexpr (H::sizes) {
          const Vec c = load(t.sizes + v);
          cuu += c * u * u;
          csu += c * s * u;
          css += c * s * s;
        } else {
          css += s * s;
        }
      }
      const Vec all[kReduceSums] = {ee, es, eu, uu, us, cuu, H::sizes ? csu : us, css};
      for (int k = 0; k < kReduceSums; ++k) sums[k * p.n + i] += lane_sum(all[k]);
    }
  });
  if (!p.grams) return;
  // Inner products, weighted by c, of m, s = c*m and u: the norms after the pull to the mean follow from
  // them.
  double* out = sums + kReduceSums * p.n;
  const int64_t square = p.n * p.n;
  const float* u = t.other;
  if (!t.sizes) {
    if (t.saliency) gram(t.masks, t.mask_stride, t.masks, t.mask_stride, p.n, t.width, out, true);
    gram(t.masks, t.mask_stride, u, t.stride, p.n, t.width, out + square, false);
    gram(u, t.stride, u, t.stride, p.n, t.width, out + 2 * square, true);
    return;
  }
  float *slope = t.force, *scaled = t.copy;  // c*m; then c*c*m and c*u, over masks that are not read again
  scale_rows(p, t, t.masks, t.mask_stride, slope);
  gram(t.masks, t.mask_stride, slope, t.stride, p.n, t.width, out, true);
  gram(slope, t.stride, u, t.stride, p.n, t.width, out + square, false);
  gram(slope, t.stride, slope, t.stride, p.n, t.width, out + 3 * square, true);
  scale_rows(p, t, slope, t.stride, scaled);
  gram(scaled, t.stride, u, t.stride, p.n, t.width, out + 4 * square, false);
  gram(scaled, t.stride, slope, t.stride, p.n, t.width, out + 5 * square, true);
  scale_rows(p, t, u, t.stride, scaled);
  gram(scaled, t.stride, u, t.stride, p.n, t.width, out + 2 * square, true);
}

// Stores row i of t.other; afterwards the row holds what a reader of the particles will see.
static void write_back(const Problem& p, const Tile& t, int64_t i) {
  float* row = t.other + i * t.stride;
  const int64_t first = i * p.mask_stride + t.begin;
  if (p.mask_kind == FloatKind::kFloat) {
    float* to = static_cast<float*>(p.masks) + first;
    for (int64_t v = 0; v < t.count; ++v) to[v] = row[v];
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(p.masks) + first;
  if (p.mask_kind == FloatKind::kHalf) {
    const RowBits random(p.key, i);
    for (int64_t v = 0; v < t.count; ++v) {
      row[v] = round_to_half(row[v], random.at(p.first_column + t.begin + v));
      to[v] = half_from_exact(row[v]);
    }
    return;
  }
  uint16_t* rest = p.residual + i * p.residual_stride + t.begin;
  for (int64_t v = 0; v < t.count; ++v) {
    to[v] = bfloat16_from_float(row[v]);
    const float rounded = float_from_bfloat16(to[v]);
    rest[v] = bfloat16_from_float(row[v] - rounded);
    row[v] = rounded + float_from_bfloat16(rest[v]);
  }
}

// t.other row i <- particle i moved.
template <class H>
static void move_row(const Problem& p, const Tile& t, int64_t i) {
  const float* m = t.masks + i * t.mask_stride;
  float* to = t.other + i * t.stride;
  if (p.skipped[i]) return pad(m, t.width, t.width, to);
  const float* grads = open_grads(p, t, i);
  const float* force = p.repel ? t.force + i * t.stride : nullptr;
  const float high = p.slope_high[i], low = p.slope_low[i];
  const float keep = p.keep[i], radial = p.radial[i], tangential = p.tangential[i];
  const Ahead ahead(p, t, i);
  for (int64_t v = 0; v < t.width; v += SFPK_LANES) {
    ahead.fetch(v);
    Vec e, u;
    descent<H>(t, grads, force, v, e, u);
    const Vec old = load(m + v);
    Vec s = old;
    if constexpr (H::sizes) s *= load(t.sizes + v);
    u = (u - high * s) - low * s;
    Vec moved = keep * old + tangential * u;
    if constexpr (H::sizes) moved += radial * s;
    store(to + v, old + moved);
  }
}

// t.other <- every row pulled towards the mean row, then scaled.
static void pull_rows(const Problem& p, const Tile& t) {
  const float inverse = 1.0f / static_cast<float>(p.n);
  for (int64_t v = 0; v < t.width; v += SFPK_LANES) {
    Vec mean = {};
    for (int64_t i = 0; i < p.n; ++i) mean += load(t.other + i * t.stride + v);
    mean *= inverse;
    for (int64_t i = 0; i < p.n; ++i) {
      if (p.skipped[i]) continue;
      float* m = t.other + i * t.stride + v;
      const Vec pulled = load(m) + p.pull * (mean - load(m));
      store(m, pulled + p.after_pull[i] * pulled);
    }
  }
}

// Update pass, one tile: moves the rows, writes them back, and measures them.
static void update_tile(const Problem& p, Tile& t, double* sums) {
  if (p.moves) {
    if (p.repel) repel(p, t);
    with_vectors(t, [&](auto have) {
      for (int64_t i = 0; i < p.n; ++i) move_row<decltype(have)>(p, t, i);
    });
    if (p.pull > 0.0f) pull_rows(p, t);
    for (int64_t i = 0; i < p.n; ++i)
      if (!p.skipped[i]) write_back(p, t, i);
    t.masks = t.other;
    t.mask_stride = t.stride;
  }
  with_vectors(t, [&](auto have) {
    using H = decltype(have);
    for (int64_t i = 0; i < p.n; ++i) {
      const float* m = t.masks + i * t.mask_stride;
      float* difference = t.force + i * t.stride;
      Vec mm = {}, cmm = {}, ccmm = {}, amm = {};
      for (int64_t v = 0; v < t.width; v += SFPK_LANES) {
        const Vec x = load(m + v), square = x * x;
        mm += square;
        if constexpr (H::sizes) {
          const Vec c = load(t.sizes + v), weighted = c * square;
          cmm += weighted;
          ccmm += c * weighted;
        }
        Vec apart = x - load(t.masks + v);
        if constexpr (H::saliency) {
          const Vec a = load(t.saliency + v);
          amm += a * square;
          apart *= a;
        }
        store(difference + v, apart);
      }
      const Vec all[kUpdateSums] = {mm, cmm, ccmm, amm};
      for (int k = 0; k < kUpdateSums; ++k) sums[k * p.n + i] += lane_sum(all[k]);
    }
  });
  if (p.n > 1) {
    // Row 0 is zero: distances of the others to it are their own squares.
    gram(t.force + t.stride, t.stride, t.force + t.stride, t.stride, p.n - 1, t.width,
         sums + kUpdateSums * p.n, true);
  }
}

void run_chunk(const Problem& p, Pass pass, int64_t begin, int64_t end, float* memory, double* sums) {
  Tile t = make_tile(p, memory);
  for (int64_t at = begin; at < end; at += p.tile) {
    open_tile(p, t, at, end - at < p.tile ? end - at : p.tile);
    if (pass == Pass::kReduce)
      reduce_tile(p, t, sums);
    else
      update_tile(p, t, sums);
  }
}
