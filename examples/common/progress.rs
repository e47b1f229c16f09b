//! Shows progress in one line that is redrawn on a terminal; elsewhere prints a line at intervals.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;

use super::tell::{duration, err};

/// The interval between lines without a terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// The minimum interval between redraws.
const DRAW_EVERY: Duration = Duration::from_millis(50);

/// Width of the bar between its brackets, in columns.
const BAR: u64 = 24;

/// Seconds over which the rate is averaged.
const RATE_SECONDS: f64 = 20.0;

/// The fraction of the smoothed loss that remains after each step.
const LOSS_DECAY: f64 = 0.98;

pub struct Progress {
    /// `None` without a terminal.
    line: Option<Arc<Mutex<Line>>>,
    total: u64,
    at: u64,
    begun: Instant,
    last_step: Instant,
    /// The time at which the last line was drawn or printed.
    last_line: Instant,
    /// Steps and seconds, both averaged the same way.
    rate: (f64, f64),
    /// Sum and weight of an exponential mean.
    loss: (f64, f64),
    loss_step: u64,
    /// Other work than steps.
    work: String,
}

impl Progress {
    /// Creates the progress of `total` steps, of which `at` are done.
    pub fn new(total: u64, at: u64) -> Self {
        let is_terminal = std::io::stderr().is_terminal() && !console::is_dumb();
        let now = Instant::now();
        Self {
            line: is_terminal.then(|| Arc::new(Mutex::new(Line::new()))),
            total,
            at,
            begun: now,
            last_step: now,
            last_line: now,
            rate: (0.0, 0.0),
            loss: (0.0, 0.0),
            loss_step: at,
            work: String::new(),
        }
    }

    /// Begins before the first step, after all lines that must be above.
    pub fn start(&mut self) {
        self.begun = Instant::now();
        self.last_step = self.begun;
        self.last_line = self.begun;
        self.draw();
    }

    /// Reports a finished step.
    pub fn advance(&mut self, at: u64) {
        let seconds = self.last_step.elapsed().as_secs_f64();
        let keep = (-seconds / RATE_SECONDS).exp();
        let steps = at.saturating_sub(self.at) as f64;
        self.rate = (self.rate.0 * keep + steps, self.rate.1 * keep + seconds);
        self.at = at;
        self.last_step = Instant::now();
        self.work.clear();
        self.show();
    }

    /// Reports the mean loss of the steps since the last report.
    pub fn loss(&mut self, step: u64, loss: f64) {
        let keep = LOSS_DECAY.powf((step - self.loss_step) as f64);
        let (sum, weight) = self.loss;
        self.loss = (sum * keep + loss * (1.0 - keep), weight * keep + 1.0 - keep);
        self.loss_step = step;
    }

    /// The smoothed loss, if one was reported.
    pub fn smooth_loss(&self) -> Option<f64> {
        let (sum, weight) = self.loss;
        (weight > 0.0).then(|| sum / weight)
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Reports work other than steps, or its end. Its time does not count.
    pub fn note(&mut self, work: &str) {
        let other = self.work.is_empty() != work.is_empty();
        self.work = work.to_owned();
        self.last_step = Instant::now();
        if other && self.line.is_some() { self.draw() } else { self.show() }
    }

    /// Returns a function that prints a line on standard error, above the progress line.
    pub fn say(&self) -> impl Fn(&str) + Send + 'static {
        let line = self.line.clone();
        move |text| match &line {
            Some(line) => lock(line).say(text),
            None => err!("{text}"),
        }
    }

    /// Leaves the line as it is and stops drawing.
    pub fn finish(&mut self) {
        if let Some(line) = self.line.take() {
            lock(&line).leave();
        }
    }

    /// Draws or prints the line if it is due.
    fn show(&mut self) {
        let every = if self.line.is_some() { DRAW_EVERY } else { LINE_EVERY };
        if self.last_line.elapsed() < every {
            return;
        }
        self.last_line = Instant::now();
        match self.line {
            Some(_) => self.draw(),
            None => err!("{}", self.texts()[0]),
        }
    }

    fn draw(&self) {
        if let Some(line) = &self.line {
            let texts = self.texts();
            lock(line).draw(&[&[self.bar() + " " + &texts[0]][..], &texts].concat());
        }
    }

    fn bar(&self) -> String {
        let filled = (self.at.min(self.total) * BAR / self.total.max(1)) as usize;
        let head = if self.at < self.total { ">" } else { "" };
        format!("[{:width$}]", "=".repeat(filled) + head, width = BAR as usize)
    }

    /// The texts of the line, the longest first. Each is for terminals too narrow for the previous one.
    fn texts(&self) -> Vec<String> {
        let Self { at, total, work, .. } = self;
        let count = format!("{at}/{total}");
        if !work.is_empty() {
            return vec![format!("{count} {work}"), work.clone()];
        }
        let (steps, seconds) = self.rate;
        if steps == 0.0 {
            return vec![count];
        }
        let rate = steps / seconds.max(1e-9);
        let left = (total - at.min(total)) as f64 / rate.max(1e-9);
        let left = format!("{} left", duration(Duration::from_secs_f64(left.min(1e9))));
        let loss = self.smooth_loss().map(|loss| format!("loss {loss:.4}, ")).unwrap_or_default();
        let rate = if rate < 10.0 { format!("{rate:.2}") } else { format!("{rate:.0}") };
        vec![
            format!("{count} {rate} steps/s, {loss}{left}"),
            format!("{count} {loss}{left}"),
            format!("{count} {left}"),
        ]
    }
}

impl Drop for Progress {
    /// Ends the line, so that the next output begins a new one.
    fn drop(&mut self) {
        self.finish();
    }
}

/// Locks the line, even if a thread that held it panicked, because it is only text.
fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last line of a terminal. If the terminal is closed, the line is lost and the program continues.
///
/// A line is never longer than the terminal is wide, and does not end with spaces. A terminal that becomes narrower
/// would wrap a longer line, and copies of it would remain above.
struct Line {
    terminal: Term,
    /// The current text, in ASCII.
    shown: String,
}

impl Line {
    fn new() -> Self {
        // Buffered, so that each line is written at once when it is flushed.
        Self { terminal: Term::buffered_stderr(), shown: String::new() }
    }

    fn columns(&self) -> usize {
        usize::from(self.terminal.size().1).max(2)
    }

    /// Shows the first text that fits, or as much of the last text as fits.
    fn draw(&mut self, texts: &[String]) {
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

    fn say(&mut self, text: &str) {
        let shown = self.shown.clone();
        self.clear();
        let _ = self.terminal.write_line(text);
        self.draw(&[shown]);
    }

    fn leave(&mut self) {
        if !self.shown.is_empty() {
            let _ = self.terminal.write_line("");
            let _ = self.terminal.flush();
            self.shown.clear();
        }
    }
}
