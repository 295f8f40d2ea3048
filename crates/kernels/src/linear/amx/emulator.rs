//! Tile instructions for machines without them: what the processor does not know it reports as a
//! signal, and the signal's handler decodes the very bytes that were assembled and does their
//! work. So the tile path is tested wherever tests run; how fast it is, only the machine can say.

use std::cell::RefCell;
use std::sync::Once;

const ROWS: usize = 16;
const ROW_BYTES: usize = 64;

type Register = [[u8; ROW_BYTES]; ROWS];

#[derive(Clone)]
struct Tiles {
    rows: [usize; 8],
    row_bytes: [usize; 8],
    data: [Register; 8],
}

impl Tiles {
    const fn new() -> Tiles {
        Tiles { rows: [0; 8], row_bytes: [0; 8], data: [[[0; ROW_BYTES]; ROWS]; 8] }
    }
}

thread_local! {
    static TILES: RefCell<Tiles> = const { RefCell::new(Tiles::new()) };
}

/// Lets this process run tile instructions, on a machine that has none.
pub(in crate::linear) fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if super::detect() {
            return;
        }
        // SAFETY: the handler touches its own thread's tiles and what the instruction names.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            assert_eq!(libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()), 0);
        }
    });
}

extern "C" fn handle(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the system hands over the context of the thread that met the instruction.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as *const u8;
    // SAFETY: instructions are at most 15 bytes, and code goes on behind them.
    let code = unsafe { std::slice::from_raw_parts(at, 15) };
    let done = TILES.with(|tiles| step(&mut tiles.borrow_mut(), code, registers));
    match done {
        Some(length) => registers[libc::REG_RIP as usize] += length as i64,
        // Somebody else's mistake: let it be seen.
        // SAFETY: always allowed.
        None => unsafe {
            libc::signal(libc::SIGILL, libc::SIG_DFL);
        },
    }
}

/// Does one instruction; returns its length.
fn step(tiles: &mut Tiles, code: &[u8], registers: &[i64; 23]) -> Option<usize> {
    // A three-byte VEX prefix of map 0F38, W = 0, L = 0.
    let [0xc4, extend, vex, opcode, modrm, ..] = *code else { return None };
    if extend & 31 != 2 || vex & 0x84 != 0 {
        return None;
    }
    let (prefix, other) = (vex & 3, usize::from(!vex >> 3 & 15));
    let (is_register, reg, rm) = (modrm >> 6 == 3, usize::from(modrm >> 3 & 7), modrm & 7);
    match (opcode, prefix, is_register) {
        (0x49, 0, true) => *tiles = Tiles::new(),
        (0x49, 3, true) => tiles.data[reg] = [[0; ROW_BYTES]; ROWS],
        (0x49, 0, false) => {
            let (at, _, length) = address(code, extend, registers)?;
            // SAFETY: LDTILECFG reads 64 bytes.
            let shapes = unsafe { std::slice::from_raw_parts(at as *const u8, 64) };
            assert_eq!(shapes[0], 1, "the palette");
            *tiles = Tiles::new();
            for t in 0..8 {
                let bytes = [shapes[16 + 2 * t], shapes[17 + 2 * t]];
                tiles.row_bytes[t] = u16::from_le_bytes(bytes).into();
                tiles.rows[t] = shapes[48 + t].into();
                assert!(tiles.rows[t] <= ROWS && tiles.row_bytes[t] <= ROW_BYTES);
            }
            return Some(length);
        }
        (0x4b, 2 | 3, false) => {
            let (at, stride, length) = address(code, extend, registers)?;
            for row in 0..tiles.rows[reg] {
                let memory = at.wrapping_add(row as i64 * stride) as *mut u8;
                let (count, register) = (tiles.row_bytes[reg], &mut tiles.data[reg][row]);
                // SAFETY: the instruction would touch the same bytes.
                unsafe {
                    if prefix == 3 {
                        std::ptr::copy_nonoverlapping(memory, register.as_mut_ptr(), count);
                    } else {
                        std::ptr::copy_nonoverlapping(register.as_ptr(), memory, count);
                    }
                }
            }
            return Some(length);
        }
        (0x5e, 1, true) => products(tiles, (reg, rm.into(), other), unsigned_signed),
        (0x5e, 2, true) => products(tiles, (reg, rm.into(), other), signed_unsigned),
        (0x5c, 2, true) => products(tiles, (reg, rm.into(), other), bfloats),
        _ => return None,
    }
    Some(5)
}

/// The address that an instruction names: base, stride of rows, and the instruction's length.
fn address(code: &[u8], extend: u8, registers: &[i64; 23]) -> Option<(i64, i64, usize)> {
    use libc::*;
    const ORDER: [i32; 16] = [
        REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9,
        REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15,
    ];
    let register = |low: u8, bit: u8| {
        let high = if extend >> bit & 1 == 0 { 8 } else { 0 };
        registers[ORDER[usize::from(low & 7) + high] as usize]
    };
    let (mode, rm) = (code[4] >> 6, code[4] & 7);
    let (base, index, mut length) = if rm == 4 {
        let sib = code[5];
        let none = sib >> 3 & 7 == 4 && extend >> 6 & 1 == 1;
        let index = if none { 0 } else { register(sib >> 3, 6) << (sib >> 6) };
        (register(sib, 5), index, 6)
    } else {
        (register(rm, 5), 0, 5)
    };
    let displacement = match mode {
        0 => 0,
        1 => {
            length += 1;
            i64::from(code[length - 1] as i8)
        }
        _ => {
            length += 4;
            i32::from_le_bytes(*code[length - 4..].first_chunk()?).into()
        }
    };
    Some((base + displacement, index, length))
}

/// A sum's new bytes, of its old ones, a row of `a`, the rows of `b`, and its column.
type Sum = fn([u8; 4], &[u8], &[[u8; ROW_BYTES]], usize) -> [u8; 4];

/// Multiplies `a` and `b` into `c`.
fn products(tiles: &mut Tiles, (c, a, b): (usize, usize, usize), each: Sum) {
    let inner = tiles.row_bytes[a] / 4;
    assert_eq!((tiles.rows[a], inner), (tiles.rows[c], tiles.rows[b]), "shapes agree");
    assert_eq!(tiles.row_bytes[b], tiles.row_bytes[c], "shapes agree");
    for row in 0..tiles.rows[c] {
        for n in 0..tiles.row_bytes[c] / 4 {
            let sum = tiles.data[c][row].as_chunks::<4>().0[n];
            let line = &tiles.data[a][row][..tiles.row_bytes[a]];
            let sum = each(sum, line, &tiles.data[b][..inner], n);
            tiles.data[c][row].as_chunks_mut::<4>().0[n] = sum;
        }
    }
}

/// TDPBUSD: four products of unsigned and signed bytes at a time.
fn unsigned_signed(sum: [u8; 4], a: &[u8], b: &[[u8; ROW_BYTES]], n: usize) -> [u8; 4] {
    bytes(sum, a, b, n, |a, b| i32::from(a) * i32::from(b as i8))
}

/// TDPBSUD: the other way round.
fn signed_unsigned(sum: [u8; 4], a: &[u8], b: &[[u8; ROW_BYTES]], n: usize) -> [u8; 4] {
    bytes(sum, a, b, n, |a, b| i32::from(a as i8) * i32::from(b))
}

fn bytes(
    sum: [u8; 4],
    a: &[u8],
    b: &[[u8; ROW_BYTES]],
    n: usize,
    product: fn(u8, u8) -> i32,
) -> [u8; 4] {
    let mut sum = i32::from_le_bytes(sum);
    for (a, b) in a.as_chunks::<4>().0.iter().zip(b) {
        for i in 0..4 {
            sum = sum.wrapping_add(product(a[i], b[4 * n + i]));
        }
    }
    sum.to_le_bytes()
}

/// TDPBF16PS: even and odd products are summed apart, then added to the sum.
fn bfloats(sum: [u8; 4], a: &[u8], b: &[[u8; ROW_BYTES]], n: usize) -> [u8; 4] {
    let wide = |x: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([x[0], x[1]])) << 16);
    let mut sums = [0.0f32; 2];
    for (a, b) in a.as_chunks::<4>().0.iter().zip(b) {
        for i in 0..2 {
            sums[i] = wide(&a[2 * i..]).mul_add(wide(&b[4 * n + 2 * i..]), sums[i]);
        }
    }
    (f32::from_le_bytes(sum) + (sums[0] + sums[1])).to_le_bytes()
}
