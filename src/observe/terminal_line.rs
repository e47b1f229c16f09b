//! The last line of a terminal, which is redrawn repeatedly.

use console::Term;

/// A redrawn line. If the terminal is closed, output is lost, and the program continues.
///
/// The line is never longer than the width of the terminal, and does not end with spaces. Otherwise a terminal that
/// becomes narrower would wrap it, and copies of it would remain above.
#[derive(Debug)]
pub(super) struct Line {
    terminal: Term,
    /// The current text, in ASCII.
    shown: String,
}

impl Line {
    pub fn new() -> Self {
        // Buffered, so that each line is written at once when it is flushed.
        Self { terminal: Term::buffered_stderr(), shown: String::new() }
    }

    fn columns(&self) -> usize {
        usize::from(self.terminal.size().1).max(2)
    }

    /// Shows the first text that fits, or as much of the last text as fits.
    pub fn draw(&mut self, texts: &[String]) {
        // The last column is not used, because some terminals continue on the next line after it.
        let room = self.columns() - 1;
        let fits = texts.iter().find(|text| text.len() <= room).or(texts.last());
        let text: String = fits.into_iter().flat_map(|text| text.chars()).take(room).collect();
        self.clear();
        let _ = self.terminal.write_str(&text);
        let _ = self.terminal.flush();
        self.shown = text;
    }

    /// Clears the line. The cursor is then at the beginning of an empty line.
    fn clear(&mut self) {
        // If the terminal became narrower, the previous text now takes several lines.
        let more = self.shown.len().saturating_sub(1) / self.columns();
        self.shown.clear();
        let _ = self.terminal.clear_line();
        let _ = self.terminal.clear_last_lines(more);
    }

    /// Prints a text above the line.
    pub fn say(&mut self, text: &str) {
        let shown = self.shown.clone();
        self.clear();
        let _ = self.terminal.write_line(text);
        self.draw(&[shown]);
    }

    /// Leaves the line as it is. The next output begins a new one.
    pub fn leave(&mut self) {
        if !self.shown.is_empty() {
            let _ = self.terminal.write_line("");
            let _ = self.terminal.flush();
            self.shown.clear();
        }
    }
}
