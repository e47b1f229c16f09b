//! Lines for the user. Once nobody can read them, since the terminal or the pipe is closed, they are
//! lost and the work goes on, where `println!` would panic.

macro_rules! out {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($line)*);
    }};
}

macro_rules! err {
    ($($line:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stderr(), $($line)*);
    }};
}

pub(crate) use {err, out};
