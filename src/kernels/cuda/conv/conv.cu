// Convolutions as products of patches. A patch is a row of kernel x kernel x channels values for an
// output pixel. If `upsample` is set, the map is first doubled in both directions.

struct Sizes {
    // Of the input before doubling.
    int h, w, channels;
    int h_out, w_out;
    int kernel, stride, pad, upsample;
};

// Finds the input pixel that position `tap` of the kernel reads for an output pixel. Returns false if it lies outside.
__device__ inline bool input_pixel(Sizes s, u32 pixel, int tap, u64 &found) {
    int out_x = pixel % s.w_out, out_y = pixel / s.w_out % s.h_out;
    u32 image = pixel / (s.w_out * s.h_out);
    int y = out_y * s.stride + tap / s.kernel - s.pad;
    int x = out_x * s.stride + tap % s.kernel - s.pad;
    found = ((u64)image * s.h + (y >> s.upsample)) * s.w + (x >> s.upsample);
    return y >= 0 && x >= 0 && y < s.h << s.upsample && x < s.w << s.upsample;
}

extern "C" __global__ void gather_patches(const T *x, T *patches, Sizes s, u32 width, u32 count) {
    u32 i = global_index() * width;
    if (i >= count) return;
    int channel = i % s.channels, tap = (i / s.channels) % (s.kernel * s.kernel);
    u64 pixel;
    bool inside = input_pixel(s, i / (s.channels * s.kernel * s.kernel), tap, pixel);
    store(patches + i, inside ? load(x + pixel * s.channels + channel, width) : zeros(), width);
}

// Computes the gradient of the map from the gradients of patches: for each value, sums over the
// patches that contain it.
extern "C" __global__ void scatter_patches(
    const T *patches, T *dx, Sizes s, int accumulate, u32 width, u32 count
) {
    u32 i = global_index() * width;
    if (i >= count) return;
    int channel = i % s.channels, x = (i / s.channels) % s.w;
    int y = (i / s.channels / s.w) % s.h;
    u32 image = i / (s.channels * s.w * s.h);
    int doubled = s.upsample ? 2 : 1;
    Values sum = accumulate ? load(dx + i, width) : zeros();
    for (int tap = 0; tap < s.kernel * s.kernel; ++tap) {
        for (int copy = 0; copy < doubled * doubled; ++copy) {
            int out_y = y * doubled + copy / doubled + s.pad - tap / s.kernel;
            int out_x = x * doubled + copy % doubled + s.pad - tap % s.kernel;
            if (out_y < 0 || out_x < 0 || out_y % s.stride || out_x % s.stride) continue;
            out_y /= s.stride;
            out_x /= s.stride;
            if (out_y >= s.h_out || out_x >= s.w_out) continue;
            u64 pixel = ((u64)image * s.h_out + out_y) * s.w_out + out_x;
            u64 at = (pixel * s.kernel * s.kernel + tap) * s.channels + channel;
            Values more = load(patches + at, width);
            EACH(k) sum.at[k] += more.at[k];
        }
    }
    store(dx + i, sum, width);
}
