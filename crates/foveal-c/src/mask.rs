//! A mask from its description: what the kind uses is read and copied, what it does not use has to be zero.

use crate::error::{Error, Result};
use crate::memory::Span;
use crate::types::*;
use foveal::Mask;
use foveal::mask::{Band, Dense, Documents, Extent};
use std::mem::size_of;

/// # Safety
/// The caller of the C function vouches for the arrays of the description.
pub(crate) unsafe fn mask(description: &foveal_mask) -> Result<Mask> {
    let foveal_mask { kind, width, band, documents, dense } = *description;
    unused(kind, FOVEAL_MASK_WINDOW, width != 0, "mask.width")?;
    let given = documents.count != 0
        || !documents.query_starts.is_null()
        || !documents.key_starts.is_null();
    unused(kind, FOVEAL_MASK_DOCUMENTS, given, "mask.documents")?;
    let foveal_dense_mask { data, batch, heads, queries, keys } = dense;
    let given = !data.is_null() || [batch, heads, queries, keys] != [0; 4];
    if kind != FOVEAL_MASK_BYTES {
        unused(kind, FOVEAL_MASK_BITS, given, "mask.dense")?;
    }
    let band = Band {
        behind: flag("mask.band.has_behind", band.has_behind, band.behind)?,
        ahead: flag("mask.band.has_ahead", band.has_ahead, band.ahead)?,
    };
    let mask = match kind {
        FOVEAL_MASK_FULL => Mask::full(),
        FOVEAL_MASK_CAUSAL => Mask::causal(),
        FOVEAL_MASK_WINDOW => Mask::window(width),
        // SAFETY: the caller's promise is the callee's.
        FOVEAL_MASK_DOCUMENTS => return unsafe { packed(documents, band) },
        // SAFETY: as above.
        FOVEAL_MASK_BYTES => unsafe { from_bytes(&dense)? },
        // SAFETY: as above.
        FOVEAL_MASK_BITS => unsafe { from_bits(&dense)? },
        got => {
            let expected = "one of the kinds FOVEAL_MASK_FULL (0) to FOVEAL_MASK_BITS (5)";
            return Err(Error::Unknown { what: "mask.kind", got, expected });
        }
    };
    Ok(match band {
        Band { behind: None, ahead: None } => mask,
        Band { behind, ahead } => mask.and(Mask::band(behind, ahead)),
    })
}

fn unused(
    kind: foveal_mask_kind,
    user: foveal_mask_kind,
    given: bool,
    what: &'static str,
) -> Result<()> {
    if !given || kind == user {
        return Ok(());
    }
    Err(Error::Unused {
        what,
        expected: "set mask.kind to the kind that uses it, or leave it zero",
    })
}

/// A limit, if its flag is 1; an unused one has to be zero.
fn flag(what: &'static str, flag: u32, limit: usize) -> Result<Option<usize>> {
    match (flag, limit) {
        (0, 0) => Ok(None),
        (0, _) => {
            Err(Error::Unused { what: "a limit of mask.band", expected: "set its flag to 1" })
        }
        (1, limit) => Ok(Some(limit)),
        (got, _) => Err(Error::Unknown { what, got, expected: "0 or 1" }),
    }
}

/// # Safety
/// That of [`mask`].
unsafe fn packed(documents: foveal_documents, within: Band) -> Result<Mask> {
    let foveal_documents { query_starts, key_starts, count } = documents;
    let starts = |what, data: *const usize| {
        Span::new(what, data.cast(), count.saturating_add(1), size_of::<usize>())
    };
    let queries = starts("mask.documents.query_starts", query_starts)?;
    let keys = if key_starts.is_null() {
        queries
    } else {
        starts("mask.documents.key_starts", key_starts)?
    };
    // SAFETY: the caller vouches for the arrays; they are read here only.
    let documents = unsafe { Documents::new(queries.read(), keys.read())? };
    Ok(documents.within(within).into())
}

/// # Safety
/// That of [`mask`].
unsafe fn from_bytes(dense: &foveal_dense_mask) -> Result<Mask> {
    let (extent, rows) = (extent(dense), rows(dense));
    let len = rows.saturating_mul(dense.keys);
    let span = Span::new("mask.dense", dense.data, len, size_of::<u8>())?;
    // SAFETY: the caller vouches for the bytes; they are read here only.
    let bytes: &[u8] = unsafe { span.read() };
    let mut words = room(rows.saturating_mul(dense.keys.div_ceil(64)))?;
    for row in bytes.chunks_exact(dense.keys.max(1)) {
        words.extend(row.chunks(64).map(|keys| {
            keys.iter().rev().fold(0, |word, &visible| word << 1 | u64::from(visible != 0))
        }));
    }
    Ok(Dense::from_words(words, extent)?.into())
}

/// # Safety
/// That of [`mask`].
unsafe fn from_bits(dense: &foveal_dense_mask) -> Result<Mask> {
    let len = rows(dense).saturating_mul(dense.keys.div_ceil(64));
    let span = Span::new("mask.dense", dense.data, len, size_of::<u64>())?;
    let mut words = room(len)?;
    // SAFETY: the caller vouches for the words; they are read here only.
    words.extend_from_slice(unsafe { span.read() });
    Ok(Dense::from_words(words, extent(dense))?.into())
}

fn extent(dense: &foveal_dense_mask) -> Extent {
    let foveal_dense_mask { batch, heads, queries, keys, .. } = *dense;
    Extent { batch, heads, queries, keys }
}

/// Rows of a mask. Where they cannot be counted, more than any memory holds.
fn rows(dense: &foveal_dense_mask) -> usize {
    if dense.batch == 0 || dense.heads == 0 || dense.queries == 0 {
        return 0;
    }
    dense.batch.saturating_mul(dense.heads).saturating_mul(dense.queries)
}

fn room(words: usize) -> Result<Vec<u64>> {
    let bytes = words.saturating_mul(size_of::<u64>());
    let mut vector = vec![];
    let refused = vector.try_reserve_exact(words);
    refused.map_err(|_| foveal::Error::OutOfMemory { what: "a dense mask", bytes })?;
    Ok(vector)
}
