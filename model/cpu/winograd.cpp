// Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks",
// 2016) for images (n, h, w, c), c a multiple of 16. Tile (y, x) covers outputs 4y..4y+3, 4x..4x+3
// and inputs one further on each side; what lies outside an image is 0. A tile has 36 entries a
// channel: 36 matrices (tiles, c), `stride` floats apart.

typedef float Vector __attribute__((vector_size(32), aligned(4)));
// ROWS x PANEL sums fill the registers of AVX2.
enum { LANES = 8, PANEL = 2 * LANES, ROWS = 6 };

// B^T d: 6 inputs -> 6 entries.
static inline void input(const Vector *d, Vector *out, int step) {
    Vector a = d[4] - 4 * d[2], b = d[3] - 4 * d[1], c = d[4] - d[2], e = 2 * (d[3] - d[1]);
    out[0] = 4 * d[0] - 5 * d[2] + d[4];
    out[step] = a + b;
    out[2 * step] = a - b;
    out[3 * step] = c + e;
    out[4 * step] = c - e;
    out[5 * step] = 4 * d[1] - 5 * d[3] + d[5];
}

// A^T m: 6 entries -> 4 outputs.
static inline void output(const Vector *m, Vector *out, int step) {
    Vector a = m[1] + m[2], b = m[1] - m[2], c = m[3] + m[4], d = m[3] - m[4];
    out[0] = m[0] + a + c;
    out[step] = b + 2 * d;
    out[2 * step] = a + 4 * c;
    out[3 * step] = b + 8 * d + m[5];
}

// A g: the adjoint of `output`, 4 gradients -> 6 entries.
static inline void spread(const Vector *g, Vector *out, int step) {
    Vector a = g[0] + g[2], b = g[1] + g[3], c = g[0] + 4 * g[2], d = 2 * g[1] + 8 * g[3];
    out[0] = g[0];
    out[step] = a + b;
    out[2 * step] = a - b;
    out[3 * step] = c + d;
    out[4 * step] = c - d;
    out[5 * step] = g[3];
}

typedef void Transform(const Vector *, Vector *, int);

// Tiles of `size` x `size` pixels that begin `before` pixels earlier -> 6 x 6 entries. `together`
// tiles lie together, 8 channels of each in turn: (tiles / together, c / 8, together, 8).
template <Transform transform, int size, int before, int together>
static inline void scatter(const float *image, float *tiles, const float *zeros, long n, long h,
                           long w, long c, long stride) {
    long high = (h + 3) / 4, wide = (w + 3) / 4, count = n * high * wide;
#pragma omp parallel for
    for (long first = 0; first < count; first += together) {
        long some = count - first < together ? count - first : together;
        const float *from[together][size][size];
        for (long j = 0; j < some; j++) {
            long p = first + j, i = p / (high * wide);
            long y = p / wide % high * 4 - before, x = p % wide * 4 - before;
            for (long r = 0; r < size; r++)
                for (long s = 0; s < size; s++) {
                    bool inside = y + r >= 0 && y + r < h && x + s >= 0 && x + s < w;
                    from[j][s][r] = inside ? image + ((i * h + y + r) * w + x + s) * c : zeros;
                }
        }
        for (long k = 0; k < c; k += LANES)
            for (long j = 0; j < some; j++) {
                Vector half[6][size], column[size], done[6];
                float *to = tiles + first * c + k * together + j * LANES;
                for (int s = 0; s < size; s++) {
                    for (int r = 0; r < size; r++) column[r] = *(const Vector *)(from[j][s][r] + k);
                    transform(column, &half[0][s], size);
                }
                for (int r = 0; r < 6; r++) {
                    transform(half[r], done, 1);
                    for (int s = 0; s < 6; s++) *(Vector *)(to + (6 * r + s) * stride) = done[s];
                }
            }
    }
}

extern "C" void inputs(const float *image, float *tiles, const float *zeros, long n, long h,
                       long w, long c, long stride) {
    scatter<input, 6, 1, 1>(image, tiles, zeros, n, h, w, c, stride);
}

extern "C" void gradients(const float *image, float *tiles, const float *zeros, long n, long h,
                          long w, long c, long stride) {
    scatter<spread, 4, 0, 1>(image, tiles, zeros, n, h, w, c, stride);
}

// Adds `bias` and what `plus` has for each image, its pixels `plus_pixel` floats apart.
static void outputs(float *image, const float *tiles, const float *bias, const float *plus,
                    long plus_image, long plus_pixel, long n, long h, long w, long c, long stride) {
    long high = (h + 3) / 4, wide = (w + 3) / 4;
#pragma omp parallel for
    for (long p = 0; p < n * high * wide; p++) {
        long i = p / (high * wide), y = p / wide % high * 4, x = p % wide * 4;
        for (long k = 0; k < c; k += LANES) {
            Vector half[4][6], column[6], done[4];
            for (int s = 0; s < 6; s++) {
                for (int r = 0; r < 6; r++)
                    column[r] = *(const Vector *)(tiles + (6 * r + s) * stride + p * c + k);
                output(column, &half[0][s], 6);
            }
            for (long r = 0; r < 4 && y + r < h; r++) {
                output(half[r], done, 1);
                for (long s = 0; s < 4 && x + s < w; s++) {
                    long pixel = (y + r) * w + x + s;
                    *(Vector *)(image + (i * h * w + pixel) * c + k) =
                        done[s] + *(const Vector *)(bias + k) +
                        *(const Vector *)(plus + i * plus_image + pixel * plus_pixel + k);
                }
            }
        }
    }
}

// `start` plus ROWS rows of V, 8 columns of each in turn, times a panel of U (c, PANEL), in registers.
static inline void multiply(const float *v, const float *u, const float *start, float *m, long c,
                            long k) {
    Vector sum[ROWS][2];
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < 2; j++) sum[r][j] = *(const Vector *)(start + j * LANES);
    for (long i = 0; i < c; i += LANES, v += ROWS * LANES)
#pragma GCC unroll 8
        for (int j = 0; j < LANES; j++, u += PANEL)
#pragma GCC unroll 6
            for (int r = 0; r < ROWS; r++) {
                sum[r][0] += v[r * LANES + j] * *(const Vector *)u;
                sum[r][1] += v[r * LANES + j] * *(const Vector *)(u + LANES);
            }
    for (int r = 0; r < ROWS; r++) {
        *(Vector *)(m + r * k) = sum[r][0];
        *(Vector *)(m + r * k + LANES) = sum[r][1];
    }
}

// For each of the 36 entries V (p, c), ROWS tiles together, times U (c, k), where U lies in panels
// (36, k / PANEL, c, PANEL).
static void products(const float *v, const float *u, float *m, const float *zeros, long p, long c,
                     long k, long v_stride, long m_stride) {
#pragma omp parallel for collapse(2)
    for (long e = 0; e < 36; e++)
        for (long q = 0; q < k / PANEL; q++) {
            const float *panel = u + (e * (k / PANEL) + q) * c * PANEL;
            const float *from = v + e * v_stride;
            float *to = m + e * m_stride + q * PANEL;
            for (long i = 0; i < p; i += ROWS) multiply(from + i * c, panel, zeros, to + i * k, c, k);
        }
}

// `step` images at a time; v and m have room for the entries of their tiles.
extern "C" void winograd(const float *image, const float *kernel, const float *bias,
                         const float *plus, float *out, const float *zeros, float *v, float *m,
                         long n, long h, long w, long c, long k, long plus_image, long plus_pixel,
                         long step, long v_stride, long m_stride) {
    for (; n > 0; n -= step) {
        if (n < step) step = n;
        long tiles = step * ((h + 3) / 4) * ((w + 3) / 4);
        scatter<input, 6, 1, ROWS>(image, v, zeros, step, h, w, c, v_stride);
        products(v, kernel, m, zeros, tiles, c, k, v_stride, m_stride);
        outputs(out, m, bias, plus, plus_image, plus_pixel, step, h, w, k, m_stride);
        image += step * h * w * c, plus += step * plus_image, out += step * h * w * k;
    }
}

// A 1x1 convolution: x (p, c) times U (c, k) in panels (k / PANEL, c, PANEL), plus bias -> (p, k).
extern "C" void pointwise(const float *x, const float *u, const float *bias, float *out, long p,
                          long c, long k) {
    const long most = 8 * ROWS;
#pragma omp parallel for
    for (long first = 0; first < p; first += most) {
        long rows = p - first < most ? p - first : most;
        float *v = new float[most * c], last[ROWS * PANEL];
        for (long i = 0; i < rows; i++)
            for (long j = 0; j < c; j += LANES)
                *(Vector *)(v + (i / ROWS * c + j) * ROWS + i % ROWS * LANES) =
                    *(const Vector *)(x + (first + i) * c + j);
        for (long q = 0; q < k; q += PANEL) {
            float *to = out + first * k + q;
            long i = 0;
            for (; i + ROWS <= rows; i += ROWS)
                multiply(v + i * c, u + q * c, bias + q, to + i * k, c, k);
            if (i == rows) continue;
            multiply(v + i * c, u + q * c, bias + q, last, c, PANEL);
            for (long r = 0; i < rows; i++, r++)
                for (long j = 0; j < PANEL; j++) to[i * k + j] = last[r * PANEL + j];
        }
        delete[] v;
    }
}
