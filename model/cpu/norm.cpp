// Group norm, followed by SiLU or not, for images (n, pixels, c) in which the channels of one pixel
// are neighbours. Each thread takes `block` channels, whole groups, of one image. Images and their
// gradients are float or bfloat16; everything else is float.

typedef float Vector __attribute__((vector_size(32), aligned(4)));
typedef unsigned Bits __attribute__((vector_size(32)));
typedef unsigned short bfloat16;  // the upper half of a float
typedef bfloat16 Halves __attribute__((vector_size(16), aligned(2)));
enum { LANES = 8, MOST = 2048 };

static inline Vector load(const float *from) { return *(const Vector *)from; }

static inline Vector load(const bfloat16 *from) {
    Bits bits;
#pragma GCC unroll 8
    for (int j = 0; j < LANES; j++) bits[j] = (unsigned)from[j] << 16;
    return (Vector)bits;
}

static inline void store(float *to, Vector x) { *(Vector *)to = x; }

// Rounded to the nearest, ties to even.
static inline void store(bfloat16 *to, Vector x) {
    Bits bits = (Bits)x;
    *(Halves *)to = __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
}

// 1 + e^-z to 2 units in the last place, z kept within -87 and 87: 2^n by the exponent's bits, the
// rest by the polynomial of degree 5 with the least relative error.
static inline Vector one_plus_decay(Vector z) {
    const float high = 1.44269502f, low = 1.925963034e-8f;  // log2(e)
    const float round = 12582912.0f + 127;  // 1.5 * 2^23 leaves no room for a fraction
    Vector most = z - z + 87.0f;            // of a constant, gcc makes two instructions for one
    z = z > most ? most : z;
    z = z < -most ? -most : z;
    Vector n = round - z * high;
    Vector f = (round - n) - z * high - z * low;
    Vector p = 1.3264727e-3f * f + 9.671513e-3f;
    p = p * f + 5.5507336e-2f;
    p = p * f + 2.4022242e-1f;
    p = p * f + 6.9314700e-1f;
    p = p * f + 1.0f;
    return p * (Vector)((Bits)n << 23) + 1.0f;
}

#define EACH_PIXEL for (long p = 0; p < pixels; p++)
#define EACH_CHANNEL for (long k = 0; k < block; k += LANES)
#define EACH_GROUP for (long k = 0; k < block; k += size)
#define AT(array) (*(Vector *)((array) + k))
#define PIXEL(array) ((array) + p * c + k)

static inline float total(const float *values, long count) {
    double sum = 0;
    for (long j = 0; j < count; j++) sum += values[j];
    return sum;
}

static inline void fill(float *values, long count, float value) {
    for (long j = 0; j < count; j++) values[j] = value;
}

// slope, offset (block): z = slope * x + offset is what SiLU is taken of.
static inline void line(float *slope, float *offset, const float *mean, const float *scale,
                        const float *weight, const float *bias, long block) {
    for (long k = 0; k < block; k++) {
        slope[k] = scale[k] * weight[k];
        offset[k] = bias[k] - mean[k] * slope[k];
    }
}

template <bool silu, typename Element>
static void apply(const Element *from, Element *to, const float *slope, const float *offset,
                  long pixels, long c, long block) {
    EACH_PIXEL EACH_CHANNEL {
        Vector z = load(PIXEL(from)) * AT(slope) + AT(offset);
        store(PIXEL(to), silu ? z / one_plus_decay(z) : z);
    }
}

// moments (2, n, c): mean and 1 / deviation of the group that each channel is in.
template <typename Element>
static void forward(const Element *x, const float *weight, const float *bias, float *moments,
                    Element *y, long n, long pixels, long c, long size, long block, long silu,
                    float eps) {
#pragma omp parallel for collapse(2)
    for (long i = 0; i < n; i++)
        for (long start = 0; start < c; start += block) {
            const Element *from = x + i * pixels * c + start;
            Element *to = y + i * pixels * c + start;
            float *mean = moments + i * c + start, *scale = mean + n * c;
            float sum[MOST] = {}, slope[MOST], offset[MOST];
            EACH_PIXEL EACH_CHANNEL AT(sum) += load(PIXEL(from));
            EACH_GROUP fill(mean + k, size, total(sum + k, size) / (size * pixels));
            fill(sum, block, 0);
            EACH_PIXEL EACH_CHANNEL {
                Vector d = load(PIXEL(from)) - AT(mean);
                AT(sum) += d * d;
            }
            EACH_GROUP {
                float variance = total(sum + k, size) / (size * pixels);
                fill(scale + k, size, 1 / __builtin_sqrt(variance + (double)eps));
            }
            line(slope, offset, mean, scale, weight + start, bias + start, block);
            (silu ? apply<true, Element> : apply<false, Element>)(from, to, slope, offset, pixels,
                                                                   c, block);
        }
}

// The gradient of z; dw, db: sums of its product with x - mean, and of itself.
template <bool silu, typename Element>
static void apply_backward(const Element *from, const Element *after, Element *to, const float *slope,
                    const float *offset, const float *mean, float *dw, float *db, long pixels,
                    long c, long block) {
    EACH_PIXEL EACH_CHANNEL {
        Vector x = load(PIXEL(from)), d = load(PIXEL(after));
        if (silu) {
            Vector z = x * AT(slope) + AT(offset), s = 1.0f / one_plus_decay(z);
            d *= s * (1.0f + z * (1.0f - s));
        }
        store(PIXEL(to), d);
        AT(dw) += d * (x - AT(mean));
        AT(db) += d;
    }
}

// after, before: the gradients of y and x. sums (2, n, c): what each image adds to the gradients
// of weight and bias.
template <typename Element>
static void backward(const Element *x, const float *weight, const float *bias,
                     const float *moments, const Element *after, Element *before, float *sums,
                     long n, long pixels, long c, long size, long block, long silu) {
#pragma omp parallel for collapse(2)
    for (long i = 0; i < n; i++)
        for (long start = 0; start < c; start += block) {
            const Element *from = x + i * pixels * c + start, *g = after + i * pixels * c + start;
            const float *mean = moments + i * c + start, *scale = mean + n * c;
            Element *to = before + i * pixels * c + start;
            float *dw = sums + i * c + start, *db = dw + n * c;
            float slope[MOST], offset[MOST], wide[MOST];
            fill(dw, block, 0), fill(db, block, 0);
            line(slope, offset, mean, scale, weight + start, bias + start, block);
            (silu ? apply_backward<true, Element> : apply_backward<false, Element>)(
                from, g, to, slope, offset, mean, dw, db, pixels, c, block);
            // The gradient of x is slope * d + wide * (x - mean) + offset: what the deviation and
            // the mean of the group pass on.
            for (long k = 0; k < block; k++) {
                dw[k] *= scale[k];
                wide[k] = weight[start + k] * dw[k], offset[k] = weight[start + k] * db[k];
            }
            EACH_GROUP {
                float each = -scale[k] / (size * pixels);
                fill(wide + k, size, each * scale[k] * total(wide + k, size));
                fill(offset + k, size, each * total(offset + k, size));
            }
            EACH_PIXEL EACH_CHANNEL {
                Vector d = load(PIXEL(to)), x = load(PIXEL(from)) - AT(mean);
                store(PIXEL(to), AT(slope) * d + AT(wide) * x + AT(offset));
            }
        }
}

// half: whether images are bfloat16.
extern "C" void norm(long half, const void *x, const float *weight, const float *bias,
                     float *moments, void *y, long n, long pixels, long c, long size, long block,
                     long silu, float eps) {
    if (half)
        forward((const bfloat16 *)x, weight, bias, moments, (bfloat16 *)y, n, pixels, c, size,
                block, silu, eps);
    else
        forward((const float *)x, weight, bias, moments, (float *)y, n, pixels, c, size, block,
                silu, eps);
}

extern "C" void norm_backward(long half, const void *x, const float *weight, const float *bias,
                              const float *moments, const void *after, void *before, float *sums,
                              long n, long pixels, long c, long size, long block, long silu) {
    if (half)
        backward((const bfloat16 *)x, weight, bias, moments, (const bfloat16 *)after,
                 (bfloat16 *)before, sums, n, pixels, c, size, block, silu);
    else
        backward((const float *)x, weight, bias, moments, (const float *)after, (float *)before,
                 sums, n, pixels, c, size, block, silu);
}
