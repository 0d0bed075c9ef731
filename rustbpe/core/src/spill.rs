//! Runs: pieces and their counts in order of the pieces, in a file without a name. The name is removed as soon as the
//! file is open, so nothing is left behind however training ends.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::{remove_file, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::{Error, Result};

const BUFFER: usize = 1 << 16;
/// Between two looks at whether to go on.
const PIECES_PER_LOOK: usize = 1 << 12;

fn failed(what: &str, folder: &Path, error: &io::Error) -> Error {
    Error::Io(format!("the spill folder {} must let runs be {what} ({error})", folder.display()))
}

/// A sorted run. Each piece stands in it once: its length (4 bytes), count (8) and bytes.
pub struct Run {
    file: File,
    folder: Box<Path>,
    /// Pieces, and the bytes of all of them.
    pub pieces: usize,
    pub bytes: usize,
}

impl Run {
    pub fn read(mut self) -> Result<Reader> {
        self.file.rewind().map_err(|error| failed("read", &self.folder, &error))?;
        let file = BufReader::with_capacity(BUFFER, self.file);
        Ok(Reader { file, folder: self.folder, left: self.pieces, piece: Vec::new(), count: 0 })
    }
}

pub struct Writer {
    file: BufWriter<File>,
    run: Run,
}

impl Writer {
    pub fn new(folder: &Path) -> Result<Self> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let unnamed = || {
            loop {
                let number = NUMBER.fetch_add(1, Relaxed);
                let path = folder.join(format!("rustbpe-{}-{number}.run", std::process::id()));
                match File::options().read(true).write(true).create_new(true).open(&path) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue, // of a killed process
                    file => {
                        let file = file?;
                        remove_file(&path)?;
                        return Ok((file.try_clone()?, file));
                    }
                }
            }
        };
        let (file, copy) = unnamed().map_err(|error| failed("written", folder, &error))?;
        let run = Run { file: copy, folder: folder.into(), pieces: 0, bytes: 0 };
        Ok(Self { file: BufWriter::with_capacity(BUFFER, file), run })
    }

    pub fn push(&mut self, piece: &[u8], count: u64) -> Result<()> {
        self.run.pieces += 1;
        self.run.bytes += piece.len();
        let mut write = || {
            self.file.write_all(&(piece.len() as u32).to_le_bytes())?;
            self.file.write_all(&count.to_le_bytes())?;
            self.file.write_all(piece)
        };
        write().map_err(|error| failed("written", &self.run.folder, &error))
    }

    pub fn finish(mut self) -> Result<Run> {
        self.file.flush().map_err(|error| failed("written", &self.run.folder, &error))?;
        Ok(self.run)
    }
}

pub struct Reader {
    file: BufReader<File>,
    folder: Box<Path>,
    left: usize,
    pub piece: Vec<u8>,
    pub count: u64,
}

impl Reader {
    /// Read the next piece and its count; false at the end.
    pub fn advance(&mut self) -> Result<bool> {
        if self.left == 0 {
            return Ok(false);
        }
        self.left -= 1;
        let (mut length, mut count) = ([0; 4], [0; 8]);
        let mut read = || {
            self.file.read_exact(&mut length)?;
            self.file.read_exact(&mut count)?;
            self.piece.resize(u32::from_le_bytes(length) as usize, 0);
            self.file.read_exact(&mut self.piece)
        };
        read().map_err(|error| failed("read", &self.folder, &error))?;
        self.count = u64::from_le_bytes(count);
        Ok(true)
    }
}

/// One run of all; a piece that stands in several gets the sum of its counts.
pub fn merge(runs: Vec<Run>, folder: &Path, watch: &mut dyn FnMut() -> bool) -> Result<Run> {
    let mut readers = runs.into_iter().map(Run::read).collect::<Result<Vec<_>>>()?;
    let mut heap = BinaryHeap::new();
    for (index, reader) in readers.iter_mut().enumerate() {
        if reader.advance()? {
            heap.push(Reverse((std::mem::take(&mut reader.piece), index)));
        }
    }
    let mut writer = Writer::new(folder)?;
    let (mut piece, mut count) = (Vec::new(), 0);
    while let Some(Reverse((next, index))) = heap.pop() {
        let reader = &mut readers[index];
        if next != piece {
            if count > 0 {
                writer.push(&piece, count)?;
            }
            if writer.run.pieces % PIECES_PER_LOOK == 0 && !watch() {
                return Err(Error::Stopped);
            }
            count = 0;
            piece.clone_from(&next);
        }
        count += reader.count;
        reader.piece = next;
        if reader.advance()? {
            heap.push(Reverse((std::mem::take(&mut reader.piece), index)));
        }
    }
    if count > 0 {
        writer.push(&piece, count)?;
    }
    writer.finish()
}
