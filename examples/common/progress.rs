//! A line on a terminal that is drawn over itself; elsewhere a line now and then.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use console::Term;

use super::tell::{duration, err};

/// From one line to the next where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Steps that follow each other sooner are not all drawn.
const DRAW_EVERY: Duration = Duration::from_millis(50);

/// Columns of the bar between its brackets.
const BAR: u64 = 24;

/// Seconds over which the rate is averaged.
const RATE_SECONDS: f64 = 20.0;

/// How much of the smoothed loss stays at each step.
const LOSS_DECAY: f64 = 0.98;

pub struct Progress {
    /// None where there is no terminal.
    line: Option<Arc<Mutex<Line>>>,
    total: u64,
    at: u64,
    begun: Instant,
    last_step: Instant,
    /// When the last line was drawn, or written.
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
    /// Of `total` steps, of which there were `at` before.
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

    /// Before the first step, once all is said that is to stand above.
    pub fn start(&mut self) {
        self.begun = Instant::now();
        self.last_step = self.begun;
        self.last_line = self.begun;
        self.draw();
    }

    /// After each step.
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

    /// The mean loss of the steps since the last one.
    pub fn loss(&mut self, step: u64, loss: f64) {
        let keep = LOSS_DECAY.powf((step - self.loss_step) as f64);
        let (sum, weight) = self.loss;
        self.loss = (sum * keep + loss * (1.0 - keep), weight * keep + 1.0 - keep);
        self.loss_step = step;
    }

    /// The smoothed loss, once there is one.
    pub fn smooth_loss(&self) -> Option<f64> {
        let (sum, weight) = self.loss;
        (weight > 0.0).then(|| sum / weight)
    }

    /// The time since the start.
    pub fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Other work than steps, or its end: its time does not count.
    pub fn note(&mut self, work: &str) {
        let other = self.work.is_empty() != work.is_empty();
        self.work = work.to_owned();
        self.last_step = Instant::now();
        if other && self.line.is_some() { self.draw() } else { self.show() }
    }

    /// Says a line on standard error, above the one that is drawn.
    pub fn say(&self) -> impl Fn(&str) + Send + 'static {
        let line = self.line.clone();
        move |text| match &line {
            Some(line) => lock(line).say(text),
            None => err!("{text}"),
        }
    }

    /// The line stays as it is, and is drawn no more.
    pub fn finish(&mut self) {
        if let Some(line) = self.line.take() {
            lock(&line).leave();
        }
    }

    /// Draws or writes the line, if it is time.
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

    /// What can be said, the longest first: each for a terminal with no room for the one before.
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
    /// What is said next is not to stand in the same line.
    fn drop(&mut self) {
        self.finish();
    }
}

/// A line that can be drawn even if a thread panicked that held it: it is only text.
fn lock(line: &Mutex<Line>) -> MutexGuard<'_, Line> {
    line.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The last line of a terminal. Where nobody can read it any longer, it is lost, and the work goes on.
///
/// A line is never longer than the terminal is wide, and has no spaces at its end: a terminal that is
/// made narrower wraps a longer line, and the copies above it would stay.
struct Line {
    terminal: Term,
    /// What stands there, in ASCII.
    shown: String,
}

impl Line {
    fn new() -> Self {
        // Written at once, as it is flushed.
        Self { terminal: Term::buffered_stderr(), shown: String::new() }
    }

    fn columns(&self) -> usize {
        usize::from(self.terminal.size().1).max(2)
    }

    /// Shows the first text for which there is room, or as much of the last one as there is room for.
    fn draw(&mut self, texts: &[String]) {
        // Not the last column: some terminals go on to the next line from there.
        let room = self.columns() - 1;
        let fits = texts.iter().find(|text| text.len() <= room).or(texts.last());
        let text: String = fits.into_iter().flat_map(|text| text.chars()).take(room).collect();
        self.clear();
        let _ = self.terminal.write_str(&text);
        let _ = self.terminal.flush();
        self.shown = text;
    }

    /// The cursor stands at the beginning of a line that is empty.
    fn clear(&mut self) {
        // What was shown before the terminal became narrower stands in several lines now.
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
