//! Emulated tile registers, for tests on machines without them. There, each tile instruction raises a fault.
//! The handler in this module decodes and emulates the instruction (Intel's "Architectures Software
//! Developer's Manual", volume 2), and continues after it.
//!
//! Instructions that a machine would reject end the process: operands whose shapes differ from the configured
//! ones, repeated tiles, or a configuration with reserved bits. A library decodes the instructions, so that
//! an encoding error in the kernels is not repeated here.

use std::cell::Cell;
use std::ffi::{c_int, c_void};
use std::io::Write;
use std::ptr;
use std::sync::OnceLock;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, Register};

use super::Config;

/// Maximum bytes per row of a tile, and maximum number of rows.
const ROW: usize = 64;
const ROWS: usize = 16;
const LONGEST_INSTRUCTION: usize = 15;

#[derive(Clone, Copy)]
struct Tile {
    rows: usize,
    row_bytes: usize,
    bytes: [[u8; ROW]; ROWS],
}

const EMPTY: Tile = Tile { rows: 0, row_bytes: 0, bytes: [[0; ROW]; ROWS] };

thread_local! {
    /// The registers of this thread, once they are configured.
    static TILES: Cell<Option<[Tile; 8]>> = const { Cell::new(None) };

    /// Makes `tdpbf16ps` of this thread add the wrong columns, to test that such tiles are rejected.
    pub static WRONG: Cell<bool> = const { Cell::new(false) };
}

/// Installs the handler. Returns whether tile instructions are emulated from now on. They are not if the
/// process may not handle faults.
pub fn install() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    *INSTALLED.get_or_init(|| {
        // The first use of the decoder builds its tables, which should not happen in the handler.
        _ = Decoder::new(64, &[0x90], DecoderOptions::NONE).decode();
        // SAFETY: a zeroed `sigaction` has no flags and no blocked signals. The handler has the type that
        // `SA_SIGINFO` requires.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) = on_fault;
            action.sa_sigaction = handler as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGILL, &action, ptr::null_mut()) == 0
        }
    })
}

extern "C" fn on_fault(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the system passes the registers of the interrupted thread, which the handler may change
    // until it returns. Faults come from the instruction itself, never from an allocation or a borrow of
    // `TILES`.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    // SAFETY: instructions that are being executed can be read. The kernels of this crate are not the last
    // bytes of the program.
    let bytes = unsafe { std::slice::from_raw_parts(at as *const u8, LONGEST_INSTRUCTION) };
    let instruction = Decoder::new(64, bytes, DecoderOptions::NONE).decode();
    let general = |register: Register| {
        use libc::*;
        Some(match register {
            Register::RAX => REG_RAX,
            Register::RBX => REG_RBX,
            Register::RCX => REG_RCX,
            Register::RDX => REG_RDX,
            Register::RSI => REG_RSI,
            Register::RDI => REG_RDI,
            Register::RBP => REG_RBP,
            Register::RSP => REG_RSP,
            Register::R8 => REG_R8,
            Register::R9 => REG_R9,
            Register::R10 => REG_R10,
            Register::R11 => REG_R11,
            Register::R12 => REG_R12,
            Register::R13 => REG_R13,
            Register::R14 => REG_R14,
            Register::R15 => REG_R15,
            _ => return None,
        })
        .map(|number| registers[number as usize] as usize)
    };
    // SAFETY: the interrupted kernel guarantees the memory that it names.
    let done = unsafe { execute(&instruction, general) };
    if let Err(why) = done {
        fail(&instruction, why);
    }
    registers[libc::REG_RIP as usize] += instruction.len() as i64;
}

/// Ends the process, because a handler cannot unwind.
fn fail(instruction: &Instruction, why: &str) -> ! {
    // If the message cannot be written, the process ends without it.
    _ = writeln!(std::io::stderr(), "{:?}: {why}", instruction.code());
    std::process::abort()
}

/// # Safety
/// The program may read or write the memory that the instruction names by these registers.
unsafe fn execute(
    instruction: &Instruction,
    general: impl Fn(Register) -> Option<usize>,
) -> Result<(), &'static str> {
    let code = instruction.code();
    let base = general(instruction.memory_base()).unwrap_or(0);
    let start = base.wrapping_add(instruction.memory_displacement64() as usize);
    // The index register holds the distance between rows.
    let step = general(instruction.memory_index()).unwrap_or(0)
        * instruction.memory_index_scale() as usize;
    let row = |i: usize| start.wrapping_add(i * step) as *mut u8;
    if code == Code::VEX_Ldtilecfg_m512 {
        if !start.is_multiple_of(align_of::<Config>()) {
            return Err("the kernel's configuration is aligned to its size");
        }
        // SAFETY: guaranteed by the caller. Any bytes are a `Config`.
        TILES.set(configured(unsafe { &*(start as *const Config) })?);
        return Ok(());
    }
    let Some(mut tiles) = TILES.get() else {
        return Err("no tiles are configured");
    };
    let number = |operand| match instruction.op_register(operand) as usize {
        register if (Register::TMM0 as usize..=Register::TMM7 as usize).contains(&register) => {
            Ok(register - Register::TMM0 as usize)
        }
        _ => Err("no tile"),
    };
    match code {
        Code::VEX_Tilerelease => {
            TILES.set(None);
            return Ok(());
        }
        Code::VEX_Tilezero_tmm => tiles[number(0)?].bytes = EMPTY.bytes,
        Code::VEX_Tileloadd_tmm_sibmem => {
            let tile = &mut tiles[number(0)?];
            tile.bytes = EMPTY.bytes;
            for i in 0..tile.rows {
                // SAFETY: guaranteed by the caller.
                unsafe {
                    row(i).copy_to_nonoverlapping(tile.bytes[i].as_mut_ptr(), tile.row_bytes)
                };
            }
        }
        Code::VEX_Tilestored_sibmem_tmm => {
            let tile = &tiles[number(1)?];
            for i in 0..tile.rows {
                // SAFETY: guaranteed by the caller.
                unsafe { row(i).copy_from_nonoverlapping(tile.bytes[i].as_ptr(), tile.row_bytes) };
            }
        }
        Code::VEX_Tdpbf16ps_tmm_tmm_tmm => {
            let (to, a, b) = (number(0)?, number(1)?, number(2)?);
            if to == a || to == b || a == b {
                return Err("a tile named twice");
            }
            tiles[to] = multiplied(tiles[to], &tiles[a], &tiles[b])?;
        }
        _ => return Err("not an instruction that is emulated"),
    }
    TILES.set(Some(tiles));
    Ok(())
}

fn configured(config: &Config) -> Result<Option<[Tile; 8]>, &'static str> {
    if config.palette == 0 {
        return Ok(None);
    }
    if config.palette != 1 || config.start_row != 0 || config.reserved != [0; 14] {
        return Err("a configuration that is none of palette 1");
    }
    if config.row_bytes[8..] != [0; 8] || config.rows[8..] != [0; 8] {
        return Err("tiles configured that do not exist");
    }
    let mut tiles = [EMPTY; 8];
    for (tile, (&row_bytes, &rows)) in
        tiles.iter_mut().zip(config.row_bytes.iter().zip(&config.rows))
    {
        (tile.rows, tile.row_bytes) = (usize::from(rows), usize::from(row_bytes));
        if tile.rows > ROWS || tile.row_bytes > ROW || (rows == 0) != (row_bytes == 0) {
            return Err("a tile of no possible shape");
        }
    }
    Ok(Some(tiles))
}

/// Emulates `tdpbf16ps` on pairs of bf16 values. The even and the odd products are summed separately, and
/// both sums are added at the end.
fn multiplied(mut to: Tile, a: &Tile, b: &Tile) -> Result<Tile, &'static str> {
    let whole = [to, *a, *b].iter().all(|tile| tile.rows > 0 && tile.row_bytes.is_multiple_of(4));
    if !whole || to.rows != a.rows || to.row_bytes != b.row_bytes || a.row_bytes / 4 != b.rows {
        return Err("tiles whose shapes do not make a product");
    }
    // Subnormal numbers are zeros, as operands and as results.
    let flushed = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let half = |row: &[u8; ROW], i: usize| {
        flushed(f32::from_bits(u32::from(u16::from_le_bytes([row[2 * i], row[2 * i + 1]])) << 16))
    };
    let columns = to.row_bytes / 4;
    let wrong = WRONG.get();
    for (row, a) in to.bytes[..to.rows].iter_mut().zip(&a.bytes) {
        let mut sums = [[0f32; 2]; ROW / 4];
        for (k, b) in b.bytes[..b.rows].iter().enumerate() {
            for (n, sums) in sums[..columns].iter_mut().enumerate() {
                for (odd, sum) in sums.iter_mut().enumerate() {
                    // Rounded once, like the machine's fused operation: the product of two bf16 values is
                    // exact in f32.
                    *sum = flushed(half(a, 2 * k + odd) * half(b, 2 * n + odd) + *sum);
                }
            }
        }
        for (n, value) in row[..to.row_bytes].chunks_exact_mut(4).enumerate() {
            let odd = sums[if wrong { (n + 1) % columns } else { n }][1];
            let before = f32::from_le_bytes([value[0], value[1], value[2], value[3]]);
            let sum = flushed(flushed(before) + flushed(sums[n][0] + odd));
            value.copy_from_slice(&sum.to_le_bytes());
        }
    }
    Ok(to)
}
