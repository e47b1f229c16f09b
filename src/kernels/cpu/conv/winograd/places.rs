//! The places of the transform of a tile.

/// The places of the transform of a tile whose values can differ from zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::kernels::cpu::conv) enum Places {
    /// All 4 by 4.
    All,
    /// All except the third place of each direction: the places of doubled pixels.
    Outer,
}

impl Places {
    pub(super) fn count(self) -> usize {
        match self {
            Self::All => 16,
            Self::Outer => 9,
        }
    }
}

/// The array of the values of an expression, in which the variable is a constant. Not `array::map`, whose
/// closure could be compiled as a separate function, without the instruction set.
macro_rules! each {
    ($i:ident in $($n:literal)+ => $value:expr) => {
        [$({
            const $i: usize = $n;
            $value
        }),+]
    };
}

pub(super) use each;

/// Returns the index of place (y, x) among those that can differ from zero, or `None` if it is not one of
/// them. `INNER` is true for [`Places::All`].
#[inline(always)]
pub(super) fn place<const INNER: bool>(y: usize, x: usize) -> Option<usize> {
    match INNER {
        true => Some(4 * y + x),
        false if y == 2 || x == 2 => None,
        false => Some(3 * (y - y / 3) + x - x / 3),
    }
}

/// Calls a function of a tile. Its last generic argument states whether the tile has all places.
macro_rules! with_places {
    ($places:expr, $f:ident::<$s:ident>($($argument:expr),* $(,)?)) => {
        match $places {
            Places::All => $f::<$s, true>($($argument),*),
            Places::Outer => $f::<$s, false>($($argument),*),
        }
    };
}
pub(super) use with_places;
