// Group norm, followed by SiLU or not, for images (n, pixels, c) in which the channels of one pixel
// are neighbours. Each thread takes `block` channels, whole groups, of one image.

typedef float Vector __attribute__((vector_size(32), aligned(4)));
typedef int Integers __attribute__((vector_size(32), aligned(4)));
enum { LANES = 8, MOST = 2048 };

// e^x for |x| < 87 to 2 units in the last place: 2^n by the exponent's bits, the rest by a
// polynomial (Cephes).
static inline Vector exponential(Vector x) {
    const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves no room for a fraction
    Vector n = (x * 1.44269504f + round) - round;
    Vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    Vector p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    return (p * r * r + r + 1.0f) * (Vector)((__builtin_convertvector(n, Integers) + 127) << 23);
}

static inline Vector sigmoid(Vector x) {
    Vector z = -x;
    Vector most = z - z + 87.0f;
    z = z > most ? most : z;
    z = z < -most ? -most : z;
    return 1.0f / (1.0f + exponential(z));
}

#define EACH_CHANNEL for (long k = 0; k < block; k += LANES)
#define EACH_GROUP for (long k = 0; k < block; k += size)
#define AT(array) (*(Vector *)((array) + k))
#define PIXEL(array) (*(Vector *)((array) + p * c + k))

static inline float total(const float *values, long count) {
    double sum = 0;
    for (long j = 0; j < count; j++) sum += values[j];
    return sum;
}

static inline void fill(float *values, long count, float value) {
    for (long j = 0; j < count; j++) values[j] = value;
}

// moments (2, n, c): mean and 1 / deviation of the group that each channel is in.
extern "C" void norm(const float *x, const float *weight, const float *bias, float *moments,
                     float *y, long n, long pixels, long c, long size, long block, long silu,
                     float eps) {
#pragma omp parallel for collapse(2)
    for (long i = 0; i < n; i++)
        for (long start = 0; start < c; start += block) {
            const float *from = x + i * pixels * c + start;
            const float *w = weight + start, *b = bias + start;
            float *to = y + i * pixels * c + start;
            float *mean = moments + i * c + start, *scale = mean + n * c, sum[MOST] = {};
            for (long p = 0; p < pixels; p++)
                EACH_CHANNEL AT(sum) += PIXEL(from);
            EACH_GROUP fill(mean + k, size, total(sum + k, size) / (size * pixels));
            fill(sum, block, 0);
            for (long p = 0; p < pixels; p++)
                EACH_CHANNEL {
                    Vector d = PIXEL(from) - AT(mean);
                    AT(sum) += d * d;
                }
            EACH_GROUP {
                float variance = total(sum + k, size) / (size * pixels);
                fill(scale + k, size, 1 / __builtin_sqrt(variance + (double)eps));
            }
            for (long p = 0; p < pixels; p++)
                EACH_CHANNEL {
                    Vector z = (PIXEL(from) - AT(mean)) * AT(scale) * AT(w) + AT(b);
                    PIXEL(to) = silu ? z * sigmoid(z) : z;
                }
        }
}

// after, before: the gradients of y and x. sums (2, n, c): what each image adds to the gradients
// of weight and bias.
extern "C" void norm_backward(const float *x, const float *weight, const float *bias,
                              const float *moments, const float *after, float *before, float *sums,
                              long n, long pixels, long c, long size, long block, long silu) {
#pragma omp parallel for collapse(2)
    for (long i = 0; i < n; i++)
        for (long start = 0; start < c; start += block) {
            const float *from = x + i * pixels * c + start, *g = after + i * pixels * c + start;
            const float *w = weight + start, *b = bias + start;
            const float *mean = moments + i * c + start, *scale = mean + n * c;
            float *to = before + i * pixels * c + start;
            float *dw = sums + i * c + start, *db = dw + n * c;
            float offset[MOST], slope[MOST];
            fill(dw, block, 0), fill(db, block, 0);
            for (long p = 0; p < pixels; p++)
                EACH_CHANNEL {
                    Vector h = (PIXEL(from) - AT(mean)) * AT(scale);
                    Vector d = PIXEL(g);
                    if (silu) {
                        Vector z = h * AT(w) + AT(b), s = sigmoid(z);
                        d *= s * (1.0f + z * (1.0f - s));
                    }
                    PIXEL(to) = d;
                    AT(dw) += d * h;
                    AT(db) += d;
                }
            for (long k = 0; k < block; k++) offset[k] = w[k] * db[k], slope[k] = w[k] * dw[k];
            EACH_GROUP {
                fill(offset + k, size, total(offset + k, size) / (size * pixels));
                fill(slope + k, size, total(slope + k, size) / (size * pixels));
            }
            for (long p = 0; p < pixels; p++)
                EACH_CHANNEL {
                    Vector h = (PIXEL(from) - AT(mean)) * AT(scale);
                    PIXEL(to) = AT(scale) * (AT(w) * PIXEL(to) - AT(offset) - h * AT(slope));
                }
        }
}
