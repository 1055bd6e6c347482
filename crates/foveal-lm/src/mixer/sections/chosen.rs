//! Mechanisms that choose keys, as the configuration describes them: models that are run and models that are trained have the
//! same.

use foveal::sparse::{
    AngularHash, Combine, Factors, NativeSizes, NativeSparse, Reformer, SparseTransformer,
    SubBlocks, Window,
};

use crate::Error;
use crate::config::{CombineHeads, Factorised, Mechanism, NearWindow};

/// The pattern of a layer.
pub(crate) fn sparse_transformer(
    mechanism: &Mechanism,
    layer: usize,
) -> Result<SparseTransformer, Error> {
    let &Mechanism::SparseTransformer { pattern, stride, width, num_verts, window, combine } =
        mechanism
    else {
        return Err(Error::SectionState);
    };
    let factors = match pattern {
        Factorised::Strided => Factors::Strided {
            stride,
            window: match window {
                NearWindow::Paper => Window::Paper,
                NearWindow::Code => Window::Code,
            },
        },
        Factorised::Fixed => Factors::Fixed {
            stride,
            summary: width,
            sub_blocks: num_verts.map_or(SubBlocks::Same(0), SubBlocks::Cycle),
        },
    };
    Ok(SparseTransformer::new(factors)?.combine(match combine {
        CombineHeads::Merged => Combine::Merged,
        CombineHeads::PerHead => Combine::PerHead,
        CombineHeads::Interleaved => Combine::Interleaved { layer },
    }))
}

/// Native Sparse Attention.
pub(crate) fn native_sparse(mechanism: &Mechanism) -> Result<NativeSparse, Error> {
    let &Mechanism::NativeSparse { length, stride, block, top, window } = mechanism else {
        return Err(Error::SectionState);
    };
    Ok(NativeSparse::new(NativeSizes { length, stride, block, top, window })?)
}

/// LSH attention with chunks of buckets, and its hash.
pub(crate) fn lsh(
    mechanism: &Mechanism,
    [heads, kv_heads, dim]: [usize; 3],
) -> Result<(Reformer, AngularHash), Error> {
    let &Mechanism::Lsh { chunk, buckets, rounds, seed } = mechanism else {
        return Err(Error::SectionState);
    };
    if heads != kv_heads {
        let expected = format!("as many as query heads, {heads}");
        return Err(Error::config("key/value heads of lsh", kv_heads, expected));
    }
    let hash = AngularHash::new(dim, buckets, rounds, seed)?;
    Ok((Reformer::new(chunk)?.bucket_chunks(), hash))
}
