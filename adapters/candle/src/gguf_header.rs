//! A look at a GGUF header before candle reads it.
//!
//! candle allocates what a header asks for, so a damaged length could exhaust memory. Here every length is held against
//! what is left of the file.

use std::io::{BufReader, Read, Seek};

/// `GGUF` as little-endian bytes.
const MAGIC: [u8; 4] = *b"GGUF";
/// Arrays within arrays.
const DEEPEST: usize = 4;
/// Dimensions of a tensor.
const MOST_DIMENSIONS: u32 = 8;

type Scanned<T> = Result<T, String>;

/// Nothing if the header of a file of `length` bytes asks for no more than there is, or if the file is no GGUF at all;
/// else what is wrong.
pub(crate) fn check<R: Read + Seek>(reader: &mut BufReader<R>, length: u64) -> Scanned<()> {
    let mut scan = Scan { reader, left: length, narrow: false, length };
    if scan.bytes::<4>()? != MAGIC {
        return Ok(()); // candle says what it is
    }
    scan.narrow = scan.u32()? == 1;
    let (tensors, entries) = (scan.count()?, scan.count()?);
    for _ in 0..entries {
        let key = scan.string()?;
        let kind = scan.u32()?;
        if key == b"general.alignment" && kind == 4 {
            let alignment = scan.u32()?;
            if !alignment.is_power_of_two() {
                return Err(format!("general.alignment={alignment} is no power of two"));
            }
        } else {
            scan.value(kind, 0)?;
        }
    }
    (0..tensors).try_for_each(|_| scan.tensor())
}

struct Scan<'a, R> {
    reader: &'a mut BufReader<R>,
    left: u64,
    /// The first version of the format counts in 32 bits.
    narrow: bool,
    length: u64,
}

impl<R: Read + Seek> Scan<'_, R> {
    /// Claims bytes of what is left.
    fn claim(&mut self, bytes: u64) -> Scanned<()> {
        let left = self.left.checked_sub(bytes);
        self.left = left.ok_or_else(|| format!("{bytes} bytes are announced where {} are left", self.left))?;
        Ok(())
    }

    fn bytes<const N: usize>(&mut self) -> Scanned<[u8; N]> {
        self.claim(N as u64)?;
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).map_err(|e| e.to_string())?;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: u64) -> Scanned<()> {
        self.claim(bytes)?;
        let bytes = i64::try_from(bytes).map_err(|e| e.to_string())?;
        self.reader.seek_relative(bytes).map_err(|e| e.to_string())
    }

    fn u32(&mut self) -> Scanned<u32> {
        self.bytes().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Scanned<u64> {
        self.bytes().map(u64::from_le_bytes)
    }

    fn count(&mut self) -> Scanned<u64> {
        if self.narrow { self.u32().map(u64::from) } else { self.u64() }
    }

    fn string(&mut self) -> Scanned<Vec<u8>> {
        let length = self.count()?;
        self.claim(length)?;
        let mut text = vec![0; length as usize];
        self.reader.read_exact(&mut text).map_err(|e| e.to_string())?;
        Ok(text)
    }

    fn value(&mut self, kind: u32, depth: usize) -> Scanned<()> {
        match (size_of(kind), kind) {
            (Some(bytes), _) => self.skip(bytes),
            (None, 8) => {
                let length = self.count()?;
                self.skip(length)
            }
            (None, 9) if depth < DEEPEST => {
                let (kind, length) = (self.u32()?, self.count()?);
                match size_of(kind) {
                    Some(bytes) => self.skip(length.checked_mul(bytes).ok_or("an array overflows")?),
                    None => (0..length).try_for_each(|_| self.value(kind, depth + 1)),
                }
            }
            (None, 9) => Err(format!("arrays are nested deeper than {DEEPEST}")),
            (None, other) => Err(format!("value type {other} is unknown")),
        }
    }

    fn tensor(&mut self) -> Scanned<()> {
        let name = self.string()?;
        let dimensions = self.u32()?;
        if dimensions > MOST_DIMENSIONS {
            return Err(format!("a tensor has {dimensions} dimensions"));
        }
        let mut numbers = 1u64;
        for _ in 0..dimensions {
            let dimension = if self.narrow { self.u32().map(u64::from) } else { self.u64() }?;
            // The smallest types pack several numbers into a byte, but not more than these.
            let fits = numbers.checked_mul(dimension).filter(|&n| n / 16 <= self.length);
            numbers = fits.ok_or_else(|| format!("`{}` is larger than the file", String::from_utf8_lossy(&name)))?;
        }
        let _dtype = self.u32()?;
        match self.u64()? {
            offset if offset <= self.length => Ok(()),
            offset => Err(format!("`{}` starts at byte {offset} of {}", String::from_utf8_lossy(&name), self.length)),
        }
    }
}

/// Bytes of a value of fixed size.
fn size_of(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}
