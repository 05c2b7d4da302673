// A tile of the transition: vectors of fp32 lanes, and how a tile's rows and vectors are read.
//
// No include guard and no includes: see transition_kernel.h.

typedef float Vec __attribute__((vector_size(SFPK_LANES * 4)));

constexpr int64_t kStep = 2 * SFPK_LANES;  // columns are padded to this

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
static inline Vec splat(float x) { return x - Vec{}; }

// The lanes in fp64, by halves.
static inline double lane_sum(Vec v) {
  typedef double Wide __attribute__((vector_size(SFPK_LANES * 8)));
  const Wide wide = __builtin_convertvector(v, Wide);
  double lanes[SFPK_LANES];
  __builtin_memcpy(lanes, &wide, sizeof lanes);
  for (int half = SFPK_LANES / 2; half > 0; half /= 2)
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  return lanes[0];
}

// A tile: rows of the particles, and the vectors they share, readable up to `width` (zeros after `count`).
struct Tile {
  int64_t begin, count, width;
  const float* masks;  // row i at masks + i * mask_stride
  int64_t mask_stride;
  const float *weights, *saliency, *sizes;  // null where the problem has none
  int64_t stride;                           // of the scratch rows below, (n, stride)
  float *force, *other, *copy, *row, *shared;
};

static Tile make_tile(const Problem& p, float* memory) {
  Tile t{};
  t.stride = p.tile + kRowPadding;
  t.force = memory;
  t.other = t.force + p.n * t.stride;
  t.copy = t.other + p.n * t.stride;
  t.row = t.copy + p.n * t.stride;
  t.shared = t.row + t.stride;
  return t;
}

// `count` values, zeros up to `width`.
static void pad(const float* from, int64_t count, int64_t width, float* to) {
  for (int64_t v = 0; v < count; ++v) to[v] = from[v];
  for (int64_t v = count; v < width; ++v) to[v] = 0.0f;
}

// `count` values of any kind as fp32, zeros up to `width`.
static void convert(const void* from, FloatKind kind, int64_t first, int64_t count, int64_t width,
                    float* to) {
  if (kind == FloatKind::kFloat) return pad(static_cast<const float*>(from) + first, count, width, to);
  const auto* bits = static_cast<const uint16_t*>(from) + first;
  if (kind == FloatKind::kBFloat16) {
    for (int64_t v = 0; v < count; ++v) to[v] = float_from_bfloat16(bits[v]);
  } else {
    for (int64_t v = 0; v < count; ++v) to[v] = float_from_half(bits[v]);
  }
  for (int64_t v = count; v < width; ++v) to[v] = 0.0f;
}

// Particle i in this tile as fp32, in t.copy.
static void copy_masks(const Problem& p, const Tile& t, int64_t i) {
  float* to = t.copy + i * t.stride;
  convert(p.masks, p.mask_kind, i * p.mask_stride + t.begin, t.count, t.width, to);
  if (!p.residual) return;
  const uint16_t* rest = p.residual + i * p.residual_stride + t.begin;
  for (int64_t v = 0; v < t.count; ++v) to[v] += float_from_bfloat16(rest[v]);
}

// Points the tile at columns [begin, begin + count); a ragged one, and particles of two bytes, are copied to
// padded scratch.
static void open_tile(const Problem& p, Tile& t, int64_t begin, int64_t count) {
  t.begin = begin;
  t.count = count;
  t.width = ceil_div(count, kStep) * kStep;
  const bool ragged = t.width != count;
  if (ragged || p.mask_kind != FloatKind::kFloat) {
    for (int64_t i = 0; i < p.n; ++i) copy_masks(p, t, i);
    t.masks = t.copy;
    t.mask_stride = t.stride;
  } else {
    t.masks = static_cast<const float*>(p.masks) + begin;
    t.mask_stride = p.mask_stride;
  }
  int64_t slot = 0;
  const auto vector = [&](const float* all) -> const float* {
    if (!all) return nullptr;
    if (!ragged) return all + begin;
    float* to = t.shared + slot++ * t.stride;
    pad(all + begin, count, t.width, to);
    return to;
  };
  t.weights = vector(p.weights);
  t.saliency = vector(p.saliency);
  t.sizes = vector(p.sizes);
}

// The gradients of particle i in this tile as fp32, in place or through t.row.
static const float* open_grads(const Problem& p, const Tile& t, int64_t i) {
  const int64_t first = i * p.grad_stride + t.begin;
  if (p.grad_kind == FloatKind::kFloat && t.width == t.count)
    return static_cast<const float*>(p.grads) + first;
  convert(p.grads, p.grad_kind, first, t.count, t.width, t.row);
  return t.row;
}

// What particle i will need of the next tile, on its way to L2 while this one is computed.
struct Ahead {
  const char *masks, *grads;
  int64_t mask_size, grad_size;

  Ahead(const Problem& p, const Tile& t, int64_t i)
      : mask_size(bytes_of(p.mask_kind)), grad_size(bytes_of(p.grad_kind)) {
    const int64_t next = t.begin + p.tile;
    masks = static_cast<const char*>(p.masks) + (i * p.mask_stride + next) * mask_size;
    grads = static_cast<const char*>(p.grads) + (i * p.grad_stride + next) * grad_size;
  }
  void fetch(int64_t v) const {
    __builtin_prefetch(masks + mask_size * v, 0, 2);
    __builtin_prefetch(grads + grad_size * v, 0, 2);
  }
};
