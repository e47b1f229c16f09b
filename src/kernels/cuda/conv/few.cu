// Gradients of convolutions with few channels, as products in f32 of patches that are gathered while they are read.
// cuDNN's kernels for these convolutions use a small part of a GPU.

typedef Tile<8, 4> Few;

// Four values as they are in memory, each in its own register. Nothing waits for them before they are converted.
struct Gathered {
    u32 at[4];

    __device__ void set(u32 k, T value) { at[k] = bits_of(value); }
    __device__ float get_at(u32 k) const { return get(of_bits(at[k])); }
};

// Patches of the input as a factor: a row is a position (kernel, kernel, in) within them, and a term an output pixel.
// The first one is pixel `first`.
struct Patches {
    typedef Gathered Quad;
    static constexpr bool ALONG = false;
    const T *x;
    Sizes s;
    u32 rows, inner, first;

    // The first row, and the position of each row in its patch: the line (12 bits), the column (12), and the channel
    // (8). To divide by the sizes for each value would take longer than to load it.
    struct Rows {
        u32 row, at[4];
    };

    __device__ Rows rows_from(u32 row) const {
        Rows own = {row};
        for (u32 k = 0; k < 4; ++k) {
            u32 tap = (row + k) / s.channels;
            own.at[k] = tap / s.kernel << 20 | tap % s.kernel << 8 | (row + k) % s.channels;
        }
        return own;
    }

    __device__ Gathered load(const Rows &own, u32 term) const {
        Gathered raw = {};
        if (own.row >= rows || term >= inner) return raw;
        u32 pixel = first + term;
        u32 line = pixel / s.w_out;
        int left = pixel % s.w_out * s.stride - s.pad, top = line % s.h_out * s.stride - s.pad;
        u32 image = line / s.h_out * s.h;
        _Pragma("unroll") for (u32 k = 0; k < 4; ++k) {
            int y = top + (int)(own.at[k] >> 20), column = left + (int)(own.at[k] >> 8 & 0xfff);
            bool inside = y >= 0 && column >= 0 && y < s.h << s.upsample && column < s.w << s.upsample;
            if (own.row + k >= rows || !inside) continue;
            u64 at = (u64)(image + (y >> s.upsample)) * s.w + (column >> s.upsample);
            raw.set(k, x[at * s.channels + (own.at[k] & 0xff)]);
        }
        return raw;
    }

    __device__ float value(const Gathered &raw, u32 k) const { return raw.get_at(k); }
};

// The gradient of the output as a factor: a row is a pixel of the input, and a term an output channel and a position of
// the kernel: (out, kernel, kernel).
struct Gradients {
    typedef Gathered Quad;
    static constexpr bool ALONG = true;
    const T *dy;
    Sizes s;
    u32 rows, inner;

    struct Rows {
        u32 row;
        int y, x;
        u64 image;
    };

    __device__ Rows rows_from(u32 row) const {
        u32 line = row / s.w;
        return {row, (int)(line % s.h) + s.pad, (int)(row % s.w) + s.pad, (u64)(line / s.h) * s.h_out};
    }

    __device__ Gathered load(const Rows &own, u32 term) const {
        Gathered raw = {};
        if (own.row >= rows || term >= inner) return raw;
        int taps = s.kernel * s.kernel, output = inner / taps;
        _Pragma("unroll") for (u32 k = 0; k < 4; ++k) {
            if (term + k >= inner) break;
            int channel = (term + k) / taps, tap = (term + k) % taps;
            int y = own.y - tap / s.kernel, x = own.x - tap % s.kernel;
            if (y < 0 || x < 0 || y % s.stride || x % s.stride) continue;
            y /= s.stride;
            x /= s.stride;
            if (y >= s.h_out || x >= s.w_out) continue;
            raw.set(k, dy[((own.image + y) * s.w_out + x) * output + channel]);
        }
        return raw;
    }

    __device__ float value(const Gathered &raw, u32 k) const { return raw.get_at(k); }
};

// Computes parts of the gradient of the weights, each from `part` of the output's pixels: (parts, out, in, kernel,
// kernel). Blocks are tiles of 32 output channels (in y) by 32 positions of patches (in z), for each part (in x).
extern "C" __launch_bounds__(THREADS, 3) __global__ void weight_gradient_of_few(
    const T *x, const T *dy, float *parts, Sizes s, u32 output, u32 part, u32 pixels
) {
    __shared__ Four shared[Few::FOURS];
    u32 first = blockIdx.x * part, left = pixels - first, inner = left < part ? left : part;
    u32 taps = s.kernel * s.kernel, channels = s.channels, patch = taps * channels;
    Factor<T, false> gradients(dy + (u64)first * output, output, inner, 0);
    Patches patches = {x, s, patch, inner, first};
    parts += (u64)blockIdx.x * output * patch;
    auto take = [=](u32 i, u32 j, float sum) { parts[i * patch + j % channels * taps + j / channels] = sum; };
    u32 row = blockIdx.y * Few::ROWS, column = blockIdx.z * Few::COLUMNS;
    product<Few>(gradients, patches, row, column, shared, [](const float *) {}, take);
}

// Computes the gradient of the input, or adds it to `dx`. `weights`: (out, kernel, kernel, in). Blocks are tiles of 32
// pixels (in x) by 32 channels (in y). The input is not doubled.
extern "C" __launch_bounds__(THREADS, 3) __global__ void input_gradient_of_few(
    const T *dy, const T *weights, T *dx, Sizes s, u32 output, int accumulate, u32 pixels
) {
    __shared__ Four shared[Few::FOURS];
    u32 channels = s.channels, terms = output * s.kernel * s.kernel;
    Gradients gradients = {dy, s, pixels, terms};
    Factor<T, false> factor(weights, channels, terms, 0);
    auto take = [=](u32 i, u32 j, float sum) {
        u64 at = (u64)i * channels + j;
        dx[at] = put(accumulate ? sum + get(dx[at]) : sum);
    };
    u32 row = blockIdx.x * Few::ROWS, column = blockIdx.y * Few::COLUMNS;
    product<Few>(gradients, factor, row, column, shared, [](const float *) {}, take);
}
