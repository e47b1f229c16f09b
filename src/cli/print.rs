use std::fmt::Display;
use std::io::{self, Write};

/// Prints a line on standard output. If the terminal or the pipe is closed, the line is lost. `println!` would panic
/// instead.
pub fn out(line: impl Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// Prints a line on standard error, like [`out`].
pub fn err(line: impl Display) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Formats a number like `1,234,567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let place = |i: usize| if i > 0 && (digits.len() - i).is_multiple_of(3) { "," } else { "" };
    digits.chars().enumerate().map(|(i, digit)| format!("{}{digit}", place(i))).collect()
}
