// Group norm followed by SiLU for images (n, pixels, c) in which the channels of one pixel are
// neighbours. Each thread takes `block` channels, whole groups, of one image.

typedef float Vector __attribute__((vector_size(32), aligned(4)));
typedef int Integers __attribute__((vector_size(32), aligned(4)));
enum { LANES = 8, MOST = 512 };

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

static inline Vector silu(Vector x) {
    Vector z = -x;
    Vector most = z - z + 87.0f;
    z = z > most ? most : z;
    z = z < -most ? -most : z;
    return x / (1.0f + exponential(z));
}

extern "C" void norm_silu(const float *x, float *y, const float *weight, const float *bias, long n,
                          long pixels, long c, long size, long block, float eps) {
#pragma omp parallel for collapse(2)
    for (long i = 0; i < n; i++)
        for (long start = 0; start < c; start += block) {
            const float *from = x + i * pixels * c + start;
            float *to = y + i * pixels * c + start;
            float mean[MOST], sum[MOST] = {}, scale[MOST];
            for (long p = 0; p < pixels; p++)
                for (long k = 0; k < block; k += LANES)
                    *(Vector *)(sum + k) += *(const Vector *)(from + p * c + k);
            for (long k = 0; k < block; k += size) {
                double total = 0;
                for (long j = 0; j < size; j++) total += sum[k + j];
                for (long j = 0; j < size; j++) mean[k + j] = total / (size * pixels);
            }
            for (long k = 0; k < block; k++) sum[k] = 0;
            for (long p = 0; p < pixels; p++)
                for (long k = 0; k < block; k += LANES) {
                    Vector d = *(const Vector *)(from + p * c + k) - *(Vector *)(mean + k);
                    *(Vector *)(sum + k) += d * d;
                }
            for (long k = 0; k < block; k += size) {
                double total = 0;
                for (long j = 0; j < size; j++) total += sum[k + j];
                double deviation = __builtin_sqrt(total / (size * pixels) + eps);
                for (long j = 0; j < size; j++) scale[k + j] = weight[start + k + j] / deviation;
            }
            for (long p = 0; p < pixels; p++)
                for (long k = 0; k < block; k += LANES) {
                    Vector d = *(const Vector *)(from + p * c + k) - *(Vector *)(mean + k);
                    Vector z = d * *(Vector *)(scale + k) + *(const Vector *)(bias + start + k);
                    *(Vector *)(to + p * c + k) = silu(z);
                }
        }
}
