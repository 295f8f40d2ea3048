//! A file of named pieces that one process writes and later ones map: bytes that cost time to
//! make, and little to find again.
//!
//! Each piece begins on a page of its own; after the last come the table of pieces and a trailer
//! with the table's place and checksum and the key under which all of it was made. A file without
//! a whole table or with another key counts as not there: half a file is never used. Owns the
//! format; where such files are kept, and for how long, is the caller's affair.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::{Advice, Mmap, MmapOptions};

/// Pieces begin at multiples of this: a page, and so a cache line.
const PAGE: u64 = 4096;
/// The last bytes of a file.
const MAGIC: [u8; 8] = *b"PIECES01";
/// Key, the table's offset and checksum, the magic.
const TRAILER: u64 = 32 + 8 + 8 + 8;
/// Longest table that is read: a thousand times that of the largest models.
const TABLE_BYTES_MAX: u64 = 64 << 20;

/// What a file of pieces was made from: only the same finds it again.
pub type PiecesKey = [u8; 32];

/// A piece in memory. Read-only, and shared by all processes that map the file.
#[derive(Clone)]
pub struct Piece {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }
}

/// A mapped file of pieces.
pub struct Pieces {
    map: Arc<Mmap>,
    table: BTreeMap<String, Range<usize>>,
}

impl Pieces {
    /// Maps the file at `path`. `Ok(None)` when it is there but not whole, or not of `key`.
    ///
    /// # Errors
    /// What the system says when the file cannot be opened or mapped.
    pub fn open(path: &Path, key: &PiecesKey) -> io::Result<Option<Pieces>> {
        let file = File::open(path)?;
        if file.metadata()?.len() < TRAILER {
            return Ok(None);
        }
        // SAFETY: read-only. Nobody changes a finished file: it is replaced by renaming and
        // removed by unlinking, both of which leave the mapping as it is.
        let map = unsafe { Mmap::map(&file)? };
        let Some(table) = table(&map, key) else { return Ok(None) };
        // Reads what is not in memory yet while the caller goes on; a hint not taken costs time.
        let _ = map.advise(Advice::WillNeed);
        Ok(Some(Pieces { map: Arc::new(map), table }))
    }

    /// The piece of that name.
    pub fn find(&self, name: &str) -> Option<Piece> {
        let range = self.table.get(name)?.clone();
        Some(Piece { map: Arc::clone(&self.map), range })
    }
}

/// Reads the table of a file, if the file is whole and has this key.
fn table(file: &[u8], key: &PiecesKey) -> Option<BTreeMap<String, Range<usize>>> {
    let (rest, trailer) = file.split_last_chunk::<{ TRAILER as usize }>()?;
    let (found, numbers) = trailer.split_at(key.len());
    let number = |at: usize| Some(u64::from_le_bytes(*numbers[at..].first_chunk()?));
    let (at, sum) = (usize::try_from(number(0)?).ok()?, number(8)?);
    let text = rest.get(at..).filter(|text| text.len() as u64 <= TABLE_BYTES_MAX)?;
    if found != key || numbers[16..] != MAGIC || sum != checksum(text) {
        return None;
    }
    let line = |line: &str| {
        let (start, line) = line.split_once(' ')?;
        let (len, name) = line.split_once(' ')?;
        let (start, len): (usize, usize) = (start.parse().ok()?, len.parse().ok()?);
        let end = start.checked_add(len).filter(|end| *end <= at)?;
        start.is_multiple_of(PAGE as usize).then(|| (name.to_owned(), start..end))
    };
    std::str::from_utf8(text).ok()?.lines().map(line).collect()
}

/// FNV-1a: finds damage, not malice. <http://www.isthe.com/chongo/tech/comp/fnv/>
fn checksum(bytes: &[u8]) -> u64 {
    let step = |sum: u64, byte: &u8| (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, step)
}

/// A file of pieces in the making, under a name of its own until it is whole. Dropped unfinished,
/// it is removed; what was mapped of it stays.
pub struct PiecesWriter {
    file: File,
    path: PathBuf,
    /// Where the current piece begins.
    at: u64,
    table: String,
}

impl PiecesWriter {
    /// Begins a file at `path`, in place of whatever a process that died left there.
    ///
    /// # Errors
    /// What the system says.
    pub fn create(path: &Path) -> io::Result<PiecesWriter> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        Ok(PiecesWriter { file, path: path.to_owned(), at: 0, table: String::new() })
    }

    /// Writes bytes of the current piece, `offset` bytes into it. Several threads may, each at
    /// offsets of its own.
    ///
    /// # Errors
    /// What the system says: a full disk, most likely.
    pub fn write_at(&self, bytes: &[u8], offset: usize) -> io::Result<()> {
        self.file.write_all_at(bytes, self.at + offset as u64)
    }

    /// Ends the current piece of `bytes` bytes, all of them written, and maps it.
    ///
    /// # Errors
    /// What the system says.
    pub fn end_piece(&mut self, name: &str, bytes: usize) -> io::Result<Piece> {
        // SAFETY: read-only; the piece is complete, and pages that it shares with others, on
        // machines with larger ones, are outside the slice that is ever made of it.
        let map = unsafe { MmapOptions::new().offset(self.at).len(bytes).map(&self.file)? };
        self.table.push_str(&format!("{} {bytes} {name}\n", self.at));
        self.at = (self.at + bytes as u64).next_multiple_of(PAGE);
        Ok(Piece { map: Arc::new(map), range: 0..bytes })
    }

    /// Adds the table, writes all through to the disk and gives the file its name. Blocks for as
    /// long as the disk takes.
    ///
    /// # Errors
    /// What the system says; the file is removed then.
    pub fn finish(self, key: &PiecesKey, name: &Path) -> io::Result<()> {
        let mut end = self.table.clone().into_bytes();
        let sum = checksum(&end);
        end.extend_from_slice(key);
        end.extend_from_slice(&self.at.to_le_bytes());
        end.extend_from_slice(&sum.to_le_bytes());
        end.extend_from_slice(&MAGIC);
        self.file.write_all_at(&end, self.at)?;
        self.file.sync_all()?;
        // From here on the file has another name, and `drop` finds nothing to remove.
        fs::rename(&self.path, name)?;
        name.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

impl Drop for PiecesWriter {
    fn drop(&mut self) {
        // After `finish` there is no such file any more.
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: PiecesKey = [7; 32];

    /// A file of two pieces.
    fn written(folder: &Path) -> PathBuf {
        let path = folder.join("file");
        let mut writer = PiecesWriter::create(&folder.join("part")).unwrap();
        writer.write_at(b"lo", 3).unwrap();
        writer.write_at(b"hel", 0).unwrap();
        assert_eq!(writer.end_piece("first piece", 5).unwrap().as_ref(), b"hello");
        writer.write_at(&[1; 5000], 0).unwrap();
        assert_eq!(writer.end_piece("second", 5000).unwrap().as_ref(), [1; 5000]);
        writer.finish(&KEY, &path).unwrap();
        path
    }

    #[test]
    fn what_was_written_is_found_again_on_pages_of_its_own() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        assert!(!folder.path().join("part").exists());
        let pieces = Pieces::open(&path, &KEY).unwrap().unwrap();
        assert_eq!(pieces.find("first piece").unwrap().as_ref(), b"hello");
        let second = pieces.find("second").unwrap();
        assert_eq!(second.as_ref(), [1; 5000]);
        assert!((second.as_ref().as_ptr() as usize).is_multiple_of(PAGE as usize));
        assert!(pieces.find("third").is_none());
    }

    #[test]
    fn another_key_finds_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        assert!(Pieces::open(&path, &[8; 32]).unwrap().is_none());
    }

    #[test]
    fn a_file_that_is_not_whole_counts_as_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let whole = fs::read(&path).unwrap();
        for len in [0, 1, 100, 4096, whole.len() - 1] {
            fs::write(&path, &whole[..len]).unwrap();
            assert!(Pieces::open(&path, &KEY).unwrap().is_none(), "{len} bytes");
        }
        // A hole in the middle moves the table away from where the trailer says it is.
        fs::write(&path, [&whole[..4096], &whole[8192..]].concat()).unwrap();
        assert!(Pieces::open(&path, &KEY).unwrap().is_none());
    }

    #[test]
    fn a_damaged_table_counts_as_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let path = written(folder.path());
        let whole = fs::read(&path).unwrap();
        for at in whole.len() - TRAILER as usize - 10..whole.len() {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).unwrap();
            assert!(Pieces::open(&path, &KEY).unwrap().is_none(), "byte {at}");
        }
    }

    #[test]
    fn an_unfinished_file_is_removed_but_stays_readable() {
        let folder = tempfile::tempdir().unwrap();
        let part = folder.path().join("part");
        let mut writer = PiecesWriter::create(&part).unwrap();
        writer.write_at(b"here", 0).unwrap();
        let piece = writer.end_piece("p", 4).unwrap();
        drop(writer);
        assert!(!part.exists());
        assert_eq!(piece.as_ref(), b"here");
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = PiecesWriter::create(&folder.path().join("part")).unwrap();
        writer.file = File::options().write(true).open("/dev/full").unwrap();
        assert_eq!(writer.write_at(b"x", 0).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
