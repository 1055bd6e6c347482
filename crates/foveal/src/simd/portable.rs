//! Arrays of eight lanes that the compiler vectorises for whatever target it builds.

use super::Simd;

/// The token of the level that every processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Portable(());

impl Portable {
    pub(crate) fn new() -> Portable {
        Portable(())
    }
}

/// Eight numbers.
#[derive(Clone, Copy)]
#[repr(align(32))]
#[allow(unreachable_pub)] // named by a trait that is sealed, not reachable
pub struct Lanes8(pub(super) [f32; 8]);

impl Lanes8 {
    #[inline(always)]
    fn zip(self, other: Lanes8, f: impl Fn(f32, f32) -> f32) -> Lanes8 {
        let mut out = self;
        for i in 0..8 {
            out.0[i] = f(self.0[i], other.0[i]);
        }
        out
    }
}

/// Exact binary16 to binary32, without tables: shift, then fix the exponent by a multiplication
/// that also normalises subnormals.
#[inline(always)]
pub(super) fn f16_to_f32(bits: u16) -> f32 {
    let magnitude = f32::from_bits(u32::from(bits & 0x7fff) << 13) * f32::from_bits(0x7780_0000);
    let special = if bits & 0x7c00 == 0x7c00 { 0x7f80_0000 } else { 0 };
    f32::from_bits(magnitude.to_bits() | special | (u32::from(bits & 0x8000) << 16))
}

impl Simd for Portable {
    type F = Lanes8;
    const LANES: usize = 8;
    const TILE_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes8 {
        Lanes8([x; 8])
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Lanes8 {
        // SAFETY: the caller promises eight readable numbers.
        Lanes8(unsafe { p.cast::<[f32; 8]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn load_part(self, p: *const f32, n: usize) -> Lanes8 {
        let mut out = [0f32; 8];
        // SAFETY: the caller promises n <= 8 readable numbers.
        unsafe { std::ptr::copy_nonoverlapping(p, out.as_mut_ptr(), n) };
        Lanes8(out)
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Lanes8) {
        // SAFETY: the caller promises eight writable numbers.
        unsafe { p.cast::<[f32; 8]>().write_unaligned(x.0) }
    }
    #[inline(always)]
    unsafe fn store_part(self, p: *mut f32, x: Lanes8, n: usize) {
        // SAFETY: the caller promises n <= 8 writable numbers.
        unsafe { std::ptr::copy_nonoverlapping(x.0.as_ptr(), p, n) };
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Lanes8 {
        // SAFETY: the caller promises eight readable numbers.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        Lanes8(bits.map(f16_to_f32))
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Lanes8 {
        // SAFETY: the caller promises eight readable numbers.
        let bits = unsafe { p.cast::<[u16; 8]>().read_unaligned() };
        Lanes8(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: Lanes8) {
        let bits = x.0.map(|x| half::f16::from_f32(x).to_bits());
        // SAFETY: the caller promises eight writable numbers.
        unsafe { p.cast::<[u16; 8]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn store_bf16(self, p: *mut u16, x: Lanes8) {
        let bits = x.0.map(|x| half::bf16::from_f32(x).to_bits());
        // SAFETY: the caller promises eight writable numbers.
        unsafe { p.cast::<[u16; 8]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn load_bytes(self, p: *const u8) -> [Lanes8; 8] {
        // SAFETY: the caller promises 64 readable bytes.
        let bytes = unsafe { p.cast::<[u8; 64]>().read_unaligned() };
        let number = |n: usize| 1.0 + f32::from(bytes[n % 16 * 4 + n / 16]) / 256.0;
        std::array::from_fn(|v| Lanes8(std::array::from_fn(|l| number(8 * v + l))))
    }
    #[inline(always)]
    unsafe fn load_halves(self, p: *const u8) -> [Lanes8; 8] {
        // SAFETY: the caller promises 32 readable bytes.
        let words = unsafe { p.cast::<[[u8; 4]; 8]>().read_unaligned() }.map(u32::from_le_bytes);
        let number = |v: usize, l: usize| {
            // The v-th vector holds codes 16 (v / 2) + 8 (v % 2) + l.
            let code = words[l] >> (4 * (v / 2) + 16 * (v % 2)) & 15;
            1.0 + code as f32 / 16.0
        };
        std::array::from_fn(|v| Lanes8(std::array::from_fn(|l| number(v, l))))
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const i8) -> Lanes8 {
        // SAFETY: the caller promises eight readable bytes.
        let bytes = unsafe { p.cast::<[i8; 8]>().read_unaligned() };
        Lanes8(bytes.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_nibbles(self, p: *const u8) -> (Lanes8, Lanes8) {
        // SAFETY: the caller promises eight readable bytes.
        let bytes = unsafe { p.cast::<[u8; 8]>().read_unaligned() };
        (Lanes8(bytes.map(|b| f32::from(b & 15))), Lanes8(bytes.map(|b| f32::from(b >> 4))))
    }

    #[inline(always)]
    fn prefetch(self, _: *const u8) {}
    #[inline(always)]
    fn add(self, a: Lanes8, b: Lanes8) -> Lanes8 {
        a.zip(b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Lanes8, b: Lanes8) -> Lanes8 {
        a.zip(b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Lanes8, b: Lanes8) -> Lanes8 {
        a.zip(b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Lanes8, b: Lanes8) -> Lanes8 {
        a.zip(b, |a, b| a / b)
    }
    #[inline(always)]
    fn sqrt(self, a: Lanes8) -> Lanes8 {
        a.zip(a, |a, _| a.sqrt())
    }
    #[inline(always)]
    fn fma(self, a: Lanes8, b: Lanes8, c: Lanes8) -> Lanes8 {
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn max(self, a: Lanes8, b: Lanes8) -> Lanes8 {
        a.zip(b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Lanes8, b: Lanes8) -> Lanes8 {
        a.zip(b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn select(self, bits: u32, a: Lanes8, b: Lanes8) -> Lanes8 {
        let mut out = b;
        for i in 0..8 {
            if bits >> i & 1 == 1 {
                out.0[i] = a.0[i];
            }
        }
        out
    }
    #[inline(always)]
    fn above(self, a: Lanes8, b: Lanes8) -> u32 {
        let mut bits = 0;
        for i in 0..8 {
            bits |= u32::from(a.0[i] > b.0[i]) << i;
        }
        bits
    }
    #[inline(always)]
    fn scale_exponent(self, p: Lanes8, t: Lanes8, x: Lanes8) -> Lanes8 {
        let mut out = p;
        for i in 0..8 {
            let scaled = p.0[i].to_bits().wrapping_add(t.0[i].to_bits() << 23);
            out.0[i] = if x.0[i] < -126.0 { 0.0 } else { f32::from_bits(scaled) };
        }
        out
    }

    #[inline(always)]
    fn sum(self, a: Lanes8) -> f32 {
        let a = a.0;
        let half = [a[0] + a[4], a[1] + a[5], a[2] + a[6], a[3] + a[7]];
        (half[0] + half[2]) + (half[1] + half[3])
    }
    #[inline(always)]
    fn reduce_max(self, a: Lanes8) -> f32 {
        a.0.into_iter().fold(f32::NEG_INFINITY, |m, x| if x > m { x } else { m })
    }
    #[inline(always)]
    unsafe fn sums(self, a: &[Lanes8; 16], out: *mut f32) {
        for (i, &x) in a.iter().enumerate() {
            // SAFETY: the caller promises 16 writable numbers.
            unsafe { out.add(i).write(self.sum(x)) };
        }
    }
    #[inline(always)]
    fn transpose(self, a: &mut [Lanes8; 16]) {
        for i in 0..8 {
            for j in 0..i {
                let (x, y) = (a[i].0[j], a[j].0[i]);
                a[i].0[j] = y;
                a[j].0[i] = x;
            }
        }
    }
}
