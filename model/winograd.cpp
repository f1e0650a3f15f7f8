// Tile transforms of Winograd's F(4x4, 3x3) (Lavin and Gray, "Fast Algorithms for Convolutional
// Neural Networks", 2016) for images (n, h, w, c), c a multiple of 8. Tile (y, x) covers outputs
// 4y..4y+3, 4x..4x+3 and inputs one further on each side; what lies outside an image is 0.
// Entry e of tile p, channel k is tiles[e * stride + p * c + k].

typedef float Vector __attribute__((vector_size(32), aligned(4)));
enum { LANES = 8, PANEL = 2 * LANES };

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

// Tiles of `size` x `size` pixels that begin `before` pixels earlier -> 6 x 6 entries.
template <Transform transform, int size, int before>
static inline void scatter(const float *image, float *tiles, const float *zeros, long n, long h,
                           long w, long c, long stride) {
    long high = (h + 3) / 4, wide = (w + 3) / 4;
#pragma omp parallel for
    for (long p = 0; p < n * high * wide; p++) {
        long i = p / (high * wide), y = p / wide % high * 4 - before, x = p % wide * 4 - before;
        const float *from[size][size];
        for (long r = 0; r < size; r++)
            for (long s = 0; s < size; s++) {
                bool inside = y + r >= 0 && y + r < h && x + s >= 0 && x + s < w;
                from[s][r] = inside ? image + ((i * h + y + r) * w + x + s) * c : zeros;
            }
        for (long k = 0; k < c; k += LANES) {
            Vector half[6][size], column[size], done[6];
            for (int s = 0; s < size; s++) {
                for (int r = 0; r < size; r++) column[r] = *(const Vector *)(from[s][r] + k);
                transform(column, &half[0][s], size);
            }
            for (int r = 0; r < 6; r++) {
                transform(half[r], done, 1);
                for (int s = 0; s < 6; s++)
                    *(Vector *)(tiles + (6 * r + s) * stride + p * c + k) = done[s];
            }
        }
    }
}

extern "C" void inputs(const float *image, float *tiles, const float *zeros, long n, long h,
                       long w, long c, long stride) {
    scatter<input, 6, 1>(image, tiles, zeros, n, h, w, c, stride);
}

extern "C" void gradients(const float *image, float *tiles, const float *zeros, long n, long h,
                          long w, long c, long stride) {
    scatter<spread, 4, 0>(image, tiles, zeros, n, h, w, c, stride);
}

extern "C" void outputs(float *image, const float *tiles, const float *bias, long n, long h,
                        long w, long c, long stride) {
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
                for (long s = 0; s < 4 && x + s < w; s++)
                    *(Vector *)(image + ((i * h + y + r) * w + x + s) * c + k) =
                        done[s] + *(const Vector *)(bias + k);
            }
        }
    }
}

// Rows of V (rows, c) times one panel of U (c, 16): the sums stay in registers.
template <int rows>
static inline void multiply(const float *v, const float *u, float *m, long c, long k) {
    Vector sum[rows][2] = {};
    for (long i = 0; i < c; i++, u += PANEL)
        for (int r = 0; r < rows; r++) {
            sum[r][0] += v[r * c + i] * *(const Vector *)u;
            sum[r][1] += v[r * c + i] * *(const Vector *)(u + LANES);
        }
    for (int r = 0; r < rows; r++) {
        *(Vector *)(m + r * k) = sum[r][0];
        *(Vector *)(m + r * k + LANES) = sum[r][1];
    }
}

// For each of the 36 entries V (p, c) times U (c, k), where U lies in panels (36, k / 16, c, 16).
extern "C" void products(const float *v, const float *u, float *m, long p, long c, long k,
                         long v_stride, long m_stride) {
#pragma omp parallel for collapse(2)
    for (long e = 0; e < 36; e++)
        for (long q = 0; q < k / PANEL; q++) {
            const float *panel = u + (e * (k / PANEL) + q) * c * PANEL;
            const float *from = v + e * v_stride;
            float *to = m + e * m_stride + q * PANEL;
            long i = 0;
            for (; i + 6 <= p; i += 6) multiply<6>(from + i * c, panel, to + i * k, c, k);
            if (p - i >= 4) multiply<4>(from + i * c, panel, to + i * k, c, k), i += 4;
            for (; i < p; i++) multiply<1>(from + i * c, panel, to + i * k, c, k);
        }
}
