//! Declarations of kernels. [`kernel!`] declares a kernel's parameters as a struct, and compares them with the
//! source when the crate is compiled.

use candle_core::cuda_backend::cudarc::driver::{DeviceRepr, LaunchArgs};

use super::element::Pointer;

/// A source of kernels, which is compiled separately from the others.
pub(super) struct Module {
    pub name: &'static str,
    /// The source, including its headers.
    pub source: &'static str,
}

/// A kernel, identified by its name in the source.
#[derive(Clone, Copy)]
pub(super) struct Kernel {
    pub module: &'static Module,
    pub name: &'static str,
}

/// The arguments of a kernel. [`kernel!`] implements this trait.
pub(super) trait Launch {
    const KERNEL: Kernel;

    /// Adds the arguments in the order of the source.
    fn push<'a>(&'a self, launch: &mut LaunchArgs<'a>);
}

/// A type that kernels take by value. It consists of plain numbers.
pub(crate) trait Argument: DeviceRepr {
    /// Name of the type in the source; `*` for a pointer.
    const TYPE: &'static str;
}

impl Argument for u32 {
    const TYPE: &'static str = "u32";
}

impl Argument for u64 {
    const TYPE: &'static str = "u64";
}

impl Argument for i32 {
    const TYPE: &'static str = "int";
}

impl Argument for f32 {
    const TYPE: &'static str = "float";
}

impl Argument for f64 {
    const TYPE: &'static str = "double";
}

// SAFETY: the only field is a `u64`.
unsafe impl DeviceRepr for Pointer {}

impl Argument for Pointer {
    const TYPE: &'static str = "*";
}

/// Declares a kernel of a module by its name in the source, and a struct of its parameters. It compiles only if
/// the names, types and order of the parameters match the source.
macro_rules! kernel {
    ($module:expr, $name:literal, $(#[$attribute:meta])* $struct:ident {
        $($parameter:ident: $type:ty),+ $(,)?
    }) => {
        $(#[$attribute])*
        struct $struct {
            $($parameter: $type),+
        }

        $(#[$attribute])*
        impl $crate::kernels::cuda::kernel::Launch for $struct {
            const KERNEL: $crate::kernels::cuda::kernel::Kernel =
                $crate::kernels::cuda::kernel::Kernel { module: $module, name: $name };

            fn push<'a>(
                &'a self,
                launch: &mut candle_core::cuda_backend::cudarc::driver::LaunchArgs<'a>,
            ) {
                use candle_core::cuda_backend::cudarc::driver::PushKernelArg;

                $(launch.arg(&self.$parameter);)+
            }
        }

        const _: () = assert!(
            $crate::kernels::cuda::kernel::declares(
                $module.source,
                $name,
                &[$((
                    <$type as $crate::kernels::cuda::kernel::Argument>::TYPE,
                    stringify!($parameter),
                )),+],
            ),
            "the source has no such kernel, or its parameters are others"
        );
    };
}
pub(super) use kernel;

/// Declares a struct that kernels of a module take by value. It compiles only if the names, types and order of
/// its fields match the struct of the same name in the source.
macro_rules! argument {
    ($module:expr, $(#[$attribute:meta])* $visible:vis struct $struct:ident {
        $($(#[$field_attribute:meta])* $field_visible:vis $field:ident: $type:ty),+ $(,)?
    }) => {
        $(#[$attribute])*
        #[derive(Debug, Clone, Copy)]
        #[repr(C)]
        $visible struct $struct {
            $($(#[$field_attribute])* $field_visible $field: $type),+
        }

        // SAFETY: the struct consists of plain numbers, with the layout of the source.
        unsafe impl candle_core::cuda_backend::cudarc::driver::DeviceRepr for $struct {}

        impl $crate::kernels::cuda::kernel::Argument for $struct {
            const TYPE: &'static str = stringify!($struct);
        }

        const _: () = assert!(
            $crate::kernels::cuda::kernel::has_struct(
                $module.source,
                stringify!($struct),
                &[$((
                    <$type as $crate::kernels::cuda::kernel::Argument>::TYPE,
                    stringify!($field),
                )),+],
            ),
            "the source has no such struct, or its fields are others"
        );
    };
}
pub(super) use argument;

/// Returns whether a source has a kernel of this name with these parameters: pairs of type (`*` for any pointer)
/// and name.
pub(super) const fn declares(source: &str, kernel: &str, parameters: &[(&str, &str)]) -> bool {
    let source = source.as_bytes();
    let Some(mut at) = after(source, "__global__ void ", kernel, "(") else { return false };
    let mut i = 0;
    while i < parameters.len() {
        // The first and the last word of one parameter.
        let (mut first, mut last, mut is_pointer) = ((0, 0), (0, 0), false);
        while at < source.len() && source[at] != b',' && source[at] != b')' {
            let start = at;
            while at < source.len() && is_of_word(source[at]) {
                at += 1;
            }
            if at > start {
                last = (start, at);
                if first.1 == 0 {
                    first = last;
                }
            } else {
                is_pointer = is_pointer || source[at] == b'*';
                at += 1;
            }
        }
        if at == source.len() {
            return false;
        }
        let (type_name, name) = parameters[i];
        let same_type = match is_pointer {
            true => is(b"*", (0, 1), type_name),
            false => is(source, first, type_name),
        };
        i += 1;
        let is_last = source[at] == b')';
        if !same_type || !is(source, last, name) || is_last != (i == parameters.len()) {
            return false;
        }
        at += 1;
    }
    true
}

/// Returns whether a source has a struct of this name with these fields: pairs of type and name. A line of
/// fields is a type and one or more names.
pub(super) const fn has_struct(source: &str, name: &str, fields: &[(&str, &str)]) -> bool {
    let source = source.as_bytes();
    let Some(mut at) = after(source, "struct ", name, " {") else { return false };
    let (mut i, mut of_type) = (0, None);
    while at < source.len() && source[at] != b'}' {
        let start = at;
        while at < source.len() && is_of_word(source[at]) {
            at += 1;
        }
        let word = (start, at);
        if is_at(source, at, "//") {
            while at < source.len() && source[at] != b'\n' {
                at += 1;
            }
        } else if at == start {
            if source[at] == b';' {
                of_type = None;
            }
            at += 1;
        } else if let Some(own) = of_type {
            if i == fields.len() || !is(source, own, fields[i].0) || !is(source, word, fields[i].1)
            {
                return false;
            }
            i += 1;
        } else {
            of_type = Some(word);
        }
    }
    at < source.len() && i == fields.len()
}

/// Returns the position after the first sequence of `before`, `name` and `behind` in the source.
const fn after(source: &[u8], before: &str, name: &str, behind: &str) -> Option<usize> {
    let mut at = 0;
    while at < source.len() {
        let middle = at + before.len();
        let end = middle + name.len();
        if is_at(source, at, before) && is_at(source, middle, name) && is_at(source, end, behind) {
            return Some(end + behind.len());
        }
        at += 1;
    }
    None
}

/// Returns whether this range of a source equals a text.
const fn is(source: &[u8], (start, end): (usize, usize), text: &str) -> bool {
    end - start == text.len() && is_at(source, start, text)
}

/// Returns whether the source continues with this text at a position.
const fn is_at(source: &[u8], at: usize, text: &str) -> bool {
    let text = text.as_bytes();
    if source.len() < at + text.len() {
        return false;
    }
    let mut i = 0;
    while i < text.len() {
        if source[at + i] != text[i] {
            return false;
        }
        i += 1;
    }
    true
}

/// Returns whether a source contains this text.
pub(super) const fn holds(source: &str, text: &str) -> bool {
    let mut at = 0;
    while at < source.len() {
        if is_at(source.as_bytes(), at, text) {
            return true;
        }
        at += 1;
    }
    false
}

const fn is_of_word(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "// add(\nstruct Sizes { int h; };
extern \"C\" __global__ void add_to(T *x, u32 n) {}
extern \"C\" __global__ void add(
    T *sum, const float * more, Sizes s, unsigned_t unused,
    double p) { f(1, 2); }";

    #[test]
    fn declarations_are_those_of_the_source() {
        let add = [("*", "sum"), ("*", "more"), ("Sizes", "s"), ("unsigned_t", "unused")];
        let add = [&add[..], &[("double", "p")]].concat();
        assert!(declares(SOURCE, "add", &add));
        assert!(declares(SOURCE, "add_to", &[("*", "x"), ("u32", "n")]));
        // Fewer parameters, more, and a different order.
        assert!(!declares(SOURCE, "add", &add[..4]));
        assert!(!declares(SOURCE, "add", &[&add[..], &add[..1]].concat()));
        assert!(!declares(SOURCE, "add_to", &[("u32", "n"), ("*", "x")]));
        // Each parameter with a different name or type.
        for i in 0..add.len() {
            for other in [("*", "other"), ("u32", add[i].1), (add[i].0, "other"), ("S", add[i].1)] {
                let mut others = add.clone();
                others[i] = other;
                assert!(!declares(SOURCE, "add", &others), "{others:?}");
            }
        }
        assert!(!declares(SOURCE, "dd", &add) && !declares(SOURCE, "sub", &add));
        assert!(!declares("__global__ void cut(T *x", "cut", &[("*", "x")]));
    }

    #[test]
    fn structs_are_those_of_the_source() {
        let source = "struct Size { int h; };\nstruct Sizes {\n    // Of a, b; c.\n    int h, w;\n    u32 n; // more
    double p;\n};";
        let sizes = [("int", "h"), ("int", "w"), ("u32", "n"), ("double", "p")];
        assert!(has_struct(source, "Sizes", &sizes));
        assert!(has_struct(source, "Size", &sizes[..1]));
        assert!(!has_struct(source, "Sizes", &sizes[..3]) && !has_struct(source, "Siz", &sizes));
        assert!(!has_struct(source, "Sizes", &[&sizes[..], &sizes[3..]].concat()));
        assert!(!has_struct("struct Sizes { int h;", "Sizes", &sizes[..1]));
        for i in 0..sizes.len() {
            for other in [("u64", sizes[i].1), (sizes[i].0, "hw"), sizes[(i + 1) % sizes.len()]] {
                let mut others = sizes;
                others[i] = other;
                assert!(!has_struct(source, "Sizes", &others), "{others:?}");
            }
        }
    }

    #[test]
    fn texts_are_found() {
        assert!(holds("#define THREADS 256\n", "THREADS 256\n"));
        assert!(!holds("#define THREADS 256\n", "THREADS 25\n") && !holds("", "a"));
    }
}
