//! Lines and numbers for the user. If the terminal or the pipe is closed, lines are lost and the program continues,
//! while `println!` would panic.

use std::time::Duration;

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

/// Formats a number like `1,234,567`.
pub fn grouped(number: usize) -> String {
    let digits = number.to_string();
    let place = |i: usize| if i > 0 && (digits.len() - i).is_multiple_of(3) { "," } else { "" };
    digits.chars().enumerate().map(|(i, digit)| format!("{}{digit}", place(i))).collect()
}

/// Formats hours, minutes and seconds, after the days if there are any.
pub fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let days = if days > 0 { format!("{days}d ") } else { String::new() };
    format!("{days}{hours:02}:{:02}:{:02}", seconds / 60 % 60, seconds % 60)
}
