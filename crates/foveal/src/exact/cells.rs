//! Keys, values and queries as the cells that a call's products take: numbers, or pairs of bf16.

use crate::cache::{KvKeys, KvRows, KvValues, kv_rows, with_rows};
use crate::element::Element;
use crate::simd::coded::with_code;
use crate::simd::product::Form;
use crate::simd::tile::{KeyWords, PANEL, pack_keys};
use crate::simd::{encode, pairs, row};
use crate::tensor::Rows;

impl Form {
    /// Packs the keys of a tile into panels at the front of `floats`; returns them.
    pub(crate) fn pack_keys<'a>(self, keys: KvKeys<'_>, floats: &'a mut [f32]) -> &'a [f32] {
        let (count, width) = keys.size();
        let panels = &mut floats[..count.div_ceil(PANEL) * PANEL * self.cells(width)];
        match (self, keys) {
            (Form::Pairs(token), KvKeys::Rows(KvRows::Bf16(rows))) => {
                pairs::pack_keys(token, rows, panels);
            }
            (_, KvKeys::Rows(rows)) => {
                with_rows!(rows, rows => pack_keys(self.level(), rows, panels));
            }
            (Form::Pairs(token), KvKeys::Channels(keys)) => {
                with_code!(keys.bits, code => encode::decode_key_pairs(token, code, keys, panels));
            }
            (Form::Numbers(level), KvKeys::Channels(keys)) => {
                with_code!(keys.bits, code => encode::decode_keys(level, code, keys, panels));
            }
        }
        panels
    }

    /// Writes the values of a tile as rows of cells to the front of `floats`.
    pub(super) fn pack_values(self, values: KvValues<'_>, floats: &mut [f32]) {
        let (count, width) = values.size();
        let cells = &mut floats[..self.cells(count) * width];
        match (self, values) {
            (Form::Pairs(token), KvValues::Rows(KvRows::Bf16(rows))) => {
                pairs::pack_values(token, rows, cells);
            }
            (_, KvValues::Rows(rows)) => with_rows!(rows, rows => {
                for (i, to) in cells.chunks_exact_mut(width).enumerate() {
                    row::widen(self.level(), rows.row(i), to);
                }
            }),
            (Form::Pairs(token), KvValues::Tokens(values)) => {
                with_code!(values.bits, code => encode::decode_value_pairs(token, code, values, cells));
            }
            (Form::Numbers(level), KvValues::Tokens(values)) => {
                with_code!(values.bits, code => encode::decode_values(level, code, values, cells));
            }
        }
    }

    /// The values of a tile as rows of cells: where they lie if they are `f32`, else in `floats`.
    pub(super) fn cell_rows<'a>(
        self,
        values: KvValues<'a>,
        floats: &'a mut [f32],
    ) -> Rows<'a, f32> {
        if let KvValues::Rows(KvRows::F32(rows)) = values {
            return rows;
        }
        self.pack_values(values, floats);
        let (count, width) = values.size();
        Rows::new(floats, width, self.cells(count), width).expect("the cells of a tile")
    }

    /// A copy of a tile's values as rows of cells, with zeros where the row's bit is not set. Allocates.
    pub(super) fn seen_values(self, values: KvValues<'_>, words: &KeyWords) -> Vec<f32> {
        let (count, width) = values.size();
        let mut cells = vec![0.0; self.cells(count) * width];
        let KvValues::Rows(rows) = values else {
            // Codes stand for finite numbers, which weights of zero take nothing from.
            self.pack_values(values, &mut cells);
            return cells;
        };
        with_rows!(rows, rows => {
            let seen = seen(rows, words);
            let rows = Rows::new(&seen, width, count, width).expect("as many as before");
            self.pack_values(KvValues::Rows(kv_rows(rows)), &mut cells);
        });
        cells
    }

    /// Copies the cells of one query, multiplied by `sign`, which is 1, −1 or 0.
    pub(super) fn load<E: Element>(self, query: &[E], sign: f32, to: &mut [f32]) {
        match (self, E::kv_rows(Rows::single(query))) {
            (Form::Pairs(token), KvRows::Bf16(query)) => {
                pairs::load(token, query.row(0), sign, to);
            }
            _ => {
                row::widen(self.level(), query, to);
                if sign != 1.0 {
                    to.iter_mut().for_each(|x| *x *= sign);
                }
            }
        }
    }
}

/// A copy of rows with zeros where the bit is not set. Allocates.
pub(super) fn seen<E: Element>(rows: Rows<'_, E>, words: &KeyWords) -> Vec<E> {
    let mut copy = vec![E::default(); rows.count() * rows.width()];
    for (j, to) in copy.chunks_exact_mut(rows.width()).enumerate() {
        if words[j / 64] >> (j % 64) & 1 == 1 {
            to.copy_from_slice(rows.row(j));
        }
    }
    copy
}
