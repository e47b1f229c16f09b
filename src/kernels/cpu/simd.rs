//! Vectors of f32, in the width of the instruction set that is selected at run time.
//!
//! A kernel is written once, generic over [`Simd`]. [`simd_fn`] compiles it for each instruction set and
//! calls the one that an [`Isa`](super::isa::Isa) names. Everything that a kernel calls must be inlined
//! into it, or it is compiled without the instruction set. Closures passed to `array::map` and similar
//! functions are not always inlined.

#[cfg(target_arch = "x86_64")]
mod transpose;

/// A vector of f32, and the operations of the kernels on it.
///
/// A function that is generic over this trait must be inlined into a function that has the instruction
/// set enabled. [`simd_fn`] does that; no other code names a type that implements the trait.
pub(crate) trait Simd: Copy {
    /// Values in a vector. Divides 16.
    const WIDTH: usize;
    /// Rows of a tile of a product that, with two vectors per row, leave registers for the operands.
    const ROWS: usize;

    /// # Safety
    /// `from` must be readable for [`WIDTH`](Self::WIDTH) values, and the machine must have the
    /// instruction set.
    unsafe fn load(from: *const f32) -> Self;

    /// # Safety
    /// `to` must be writable for [`WIDTH`](Self::WIDTH) values, and the machine must have the instruction
    /// set.
    unsafe fn store(self, to: *mut f32);

    fn splat(value: f32) -> Self;
    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// The greater of both, or NaN if `self` is NaN.
    fn at_least(self, low: Self) -> Self;
    /// The less of both, or NaN if `self` is NaN.
    fn at_most(self, high: Self) -> Self;
    /// 2 to the power of the integer in the last 8 bits.
    fn power_of_two(self) -> Self;
    /// `self * other + sum`. Vectors round once if the instruction set has a fused instruction. Single values round twice.
    fn mul_add(self, other: Self, sum: Self) -> Self;

    /// Transposes a block of [`WIDTH`](Self::WIDTH) x `WIDTH` values. Writes the first `columns` rows of the transpose.
    ///
    /// # Safety
    /// The rows of the block, which begin `from_row` values apart, must be readable. `columns` is at most
    /// [`WIDTH`](Self::WIDTH). `columns` rows of `WIDTH` values, which begin `to_row` values apart, must be writable.
    #[inline(always)]
    unsafe fn transpose(
        from: *const f32,
        from_row: usize,
        to: *mut f32,
        to_row: usize,
        columns: usize,
    ) {
        for row in 0..Self::WIDTH {
            for column in 0..columns {
                // SAFETY: the caller guarantees the requirements.
                unsafe { *to.add(column * to_row + row) = *from.add(row * from_row + column) };
            }
        }
    }
}

/// The bits of 1.
const ONE: u32 = 1f32.to_bits();

/// Implements [`Simd`] with the instructions of a machine.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! vector {
    ($(#[$meta:meta])* $name:ident($register:ty), width $width:literal, rows $rows:literal,
     $load:ident $store:ident $splat:ident $add:ident $sub:ident $mul:ident $div:ident $max:ident
     $min:ident $mul_add:expr,
     bits $to_bits:ident $shift:path, $add_bits:ident $splat_bits:ident $from_bits:ident
     $(, transpose $transpose:path)?) => {
        $(#[$meta])*
        #[derive(Clone, Copy)]
        pub(crate) struct $name($register);

        // SAFETY, for each block: by the contract of the trait, callers have the instruction set
        // enabled. `load` and `store` pass their requirements on pointers on to their callers.
        impl Simd for $name {
            const WIDTH: usize = $width;
            const ROWS: usize = $rows;

            #[inline(always)]
            unsafe fn load(from: *const f32) -> Self {
                // SAFETY: see above.
                Self(unsafe { $load(from) })
            }

            #[inline(always)]
            unsafe fn store(self, to: *mut f32) {
                // SAFETY: see above.
                unsafe { $store(to, self.0) }
            }

            #[inline(always)]
            fn splat(value: f32) -> Self {
                // SAFETY: see above.
                Self(unsafe { $splat(value) })
            }

            #[inline(always)]
            fn add(self, other: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $add(self.0, other.0) })
            }

            #[inline(always)]
            fn sub(self, other: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $sub(self.0, other.0) })
            }

            #[inline(always)]
            fn mul(self, other: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $mul(self.0, other.0) })
            }

            #[inline(always)]
            fn div(self, other: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $div(self.0, other.0) })
            }

            #[inline(always)]
            fn at_least(self, low: Self) -> Self {
                // SAFETY: see above. x86 returns the second operand if one is NaN.
                Self(unsafe { $max(low.0, self.0) })
            }

            #[inline(always)]
            fn at_most(self, high: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $min(high.0, self.0) })
            }

            #[inline(always)]
            fn power_of_two(self) -> Self {
                // SAFETY: see above.
                unsafe {
                    let exponent = $shift($to_bits(self.0));
                    Self($from_bits($add_bits(exponent, $splat_bits(ONE as _))))
                }
            }

            #[inline(always)]
            fn mul_add(self, other: Self, sum: Self) -> Self {
                // SAFETY: see above.
                Self(unsafe { $mul_add(self.0, other.0, sum.0) })
            }

            $(#[inline(always)]
            unsafe fn transpose(
                from: *const f32,
                from_row: usize,
                to: *mut f32,
                to_row: usize,
                columns: usize,
            ) {
                // SAFETY: see above. The requirements on pointers are passed on.
                unsafe { $transpose(from, from_row, to, to_row, columns) }
            })?
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod machine {
    use super::{ONE, Simd, transpose};
    use std::arch::x86_64::*;

    vector!(
        Avx512(__m512), width 16, rows 14,
        _mm512_loadu_ps _mm512_storeu_ps _mm512_set1_ps
        _mm512_add_ps _mm512_sub_ps _mm512_mul_ps _mm512_div_ps _mm512_max_ps
        _mm512_min_ps _mm512_fmadd_ps,
        bits _mm512_castps_si512 _mm512_slli_epi32::<23>, _mm512_add_epi32 _mm512_set1_epi32
        _mm512_castsi512_ps,
        transpose transpose::avx512
    );

    vector!(
        Avx2(__m256), width 8, rows 6,
        _mm256_loadu_ps _mm256_storeu_ps _mm256_set1_ps
        _mm256_add_ps _mm256_sub_ps _mm256_mul_ps _mm256_div_ps _mm256_max_ps
        _mm256_min_ps _mm256_fmadd_ps,
        bits _mm256_castps_si256 _mm256_slli_epi32::<23>, _mm256_add_epi32 _mm256_set1_epi32
        _mm256_castsi256_ps,
        transpose transpose::avx2
    );

    vector!(
        /// SSE2, which has no fused multiply-add.
        Baseline(__m128), width 4, rows 5,
        _mm_loadu_ps _mm_storeu_ps _mm_set1_ps _mm_add_ps _mm_sub_ps _mm_mul_ps _mm_div_ps
        _mm_max_ps _mm_min_ps |a, b, sum| _mm_add_ps(_mm_mul_ps(a, b), sum),
        bits _mm_castps_si128 _mm_slli_epi32::<23>, _mm_add_epi32 _mm_set1_epi32 _mm_castsi128_ps
    );
}

#[cfg(target_arch = "aarch64")]
mod machine {
    use super::{ONE, Simd};
    use std::arch::aarch64::*;

    vector!(
        /// NEON.
        Baseline(float32x4_t), width 4, rows 12,
        vld1q_f32 vst1q_f32 vdupq_n_f32 vaddq_f32 vsubq_f32 vmulq_f32 vdivq_f32 vmaxq_f32
        vminq_f32 |a, b, sum| vfmaq_f32(sum, a, b),
        bits vreinterpretq_u32_f32 vshlq_n_u32::<23>, vaddq_u32 vdupq_n_u32 vreinterpretq_f32_u32
    );
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod machine {
    pub(crate) type Baseline = f32;
}

pub(crate) use machine::*;

/// A single value: for values that do not fill a vector, and for architectures without vectors here.
impl Simd for f32 {
    const WIDTH: usize = 1;
    const ROWS: usize = 4;

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: readable, as the caller guarantees.
        unsafe { *from }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: writable, as the caller guarantees.
        unsafe { *to = self }
    }

    #[inline(always)]
    fn splat(value: f32) -> Self {
        value
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self + other
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self - other
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self * other
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self / other
    }

    #[inline(always)]
    fn at_least(self, low: Self) -> Self {
        if low > self { low } else { self }
    }

    #[inline(always)]
    fn at_most(self, high: Self) -> Self {
        if high < self { high } else { self }
    }

    #[inline(always)]
    fn power_of_two(self) -> Self {
        Self::from_bits((self.to_bits() << 23).wrapping_add(ONE))
    }

    #[inline(always)]
    fn mul_add(self, other: Self, sum: Self) -> Self {
        self * other + sum
    }
}

/// Returns the values of a vector, followed by zeros.
#[inline(always)]
pub(crate) fn lanes<S: Simd>(vector: S) -> [f32; 16] {
    let mut lanes = [0f32; 16];
    // SAFETY: no vector has more values.
    unsafe { vector.store(lanes.as_mut_ptr()) };
    lanes
}

/// Calls a function for each whole vector of channels, then for each remaining channel. The variable
/// holds the number of the first channel.
macro_rules! for_channels {
    ($first:ident in $channels:expr,
     $f:ident::<$s:ident $(, $more:literal)?>($($argument:expr),* $(,)?) $(,)?) => {
        let mut $first = 0;
        while $first + $s::WIDTH <= $channels {
            $f::<$s $(, $more)?>($($argument),*);
            $first += $s::WIDTH;
        }
        while $first < $channels {
            $f::<f32 $(, $more)?>($($argument),*);
            $first += 1;
        }
    };
}
pub(crate) use for_channels;

/// Calls a function for groups of several vectors of channels, whose sums are independent, so that none waits for the
/// addition before it. Then calls it for single vectors, then for each remaining channel.
/// The list has the sizes of groups in vectors, the largest first. The size of a group is the last generic argument of the
/// function.
macro_rules! for_channel_groups {
    ($first:ident in $channels:expr, [$($group:literal),*],
     $f:ident::<$s:ident> $arguments:tt $(,)?) => {
        let mut $first = 0;
        $(while $first + $group * $s::WIDTH <= $channels {
            $f::<$s, $group> $arguments;
            $first += $group * $s::WIDTH;
        })*
        while $first + $s::WIDTH <= $channels {
            $f::<$s, 1> $arguments;
            $first += $s::WIDTH;
        }
        while $first < $channels {
            $f::<f32, 1> $arguments;
            $first += 1;
        }
    };
}
pub(crate) use for_channel_groups;

/// Defines a function whose first argument is an [`Isa`](super::isa::Isa) and whose body runs in the
/// vectors of that instruction set: `fn name<S>(arguments) { body }`, with `S: Simd` within the body.
macro_rules! simd_fn {
    ($(#[$meta:meta])* $vis:vis fn $name:ident<$s:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        $vis fn $name(isa: crate::kernels::cpu::isa::Isa, $($arg: $ty),*) $(-> $ret)? {
            use crate::kernels::cpu::isa::Kind;
            use crate::kernels::cpu::simd::Simd;

            #[inline(always)]
            fn generic<$s: Simd>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512vl,avx2,fma")]
            fn avx512($($arg: $ty),*) $(-> $ret)? {
                generic::<crate::kernels::cpu::simd::Avx512>($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $ty),*) $(-> $ret)? {
                generic::<crate::kernels::cpu::simd::Avx2>($($arg),*)
            }

            match isa.kind() {
                // SAFETY: an `Isa` of this kind exists only if the machine has the instruction set.
                #[cfg(target_arch = "x86_64")]
                Kind::Avx512 => unsafe { avx512($($arg),*) },
                // SAFETY: as above.
                #[cfg(target_arch = "x86_64")]
                Kind::Avx2 => unsafe { avx2($($arg),*) },
                Kind::Baseline => generic::<crate::kernels::cpu::simd::Baseline>($($arg),*),
            }
        }
    };
}
pub(crate) use simd_fn;
