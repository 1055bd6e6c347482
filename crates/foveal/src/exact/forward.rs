//! Forward attention for prompts: tiles of query rows against packed key tiles.
//!
//! ```text
//! pack K of each (sequence, key/value head)            once, shared by all its query rows
//! for each tile of 48 query rows:                      a part that one thread picks up
//!     for each key tile that some row may see:         live ranges of the mask
//!         for each group of 6 rows:                    scores stay in L1
//!             S = Q Kᵀ, mask        m, l, α            O ← α O + P V
//!     out = O / l,  lse = m + ln l
//! ```
//!
//! The rows of a tile are neighbouring positions of one head, or of all heads of a group where the mask
//! is the same for all: then row r is position r / fold of head r % fold. One tile or less per
//! key/value head packs its keys as it goes instead, so that short inputs read keys once.
//!
//! Queries, keys and values of bf16 are multiplied in pairs where the processor can; P is then rounded to bf16 for the
//! product with V (but not for its sum). Everything else is the same.
//!
//! Key tiles start at multiples of 256 of the sequence's own position and are taken in order, so a
//! row's bits depend on nothing but its query, keys and values: not on the other rows of the call, not
//! on threads, not on how a prompt was cut into calls.

use super::relative::{self, Band, Columns, Shared};
use super::terms::{Finish, RowSite, Terms};
use super::{Factor, Problem, live_tiles, sees, short};
use crate::cache::{KvRows, KvValues};
use crate::element::Element;
use crate::mask::{Pattern, Site};
use crate::parallel::for_each_part;
use crate::plan::Sizes;
use crate::simd::product::Form;
use crate::simd::tile::{
    self, GROUP, KEY_TILE, KeyWords, PANEL, STEP, Scores, Softmax, Values, Visible, padded,
};
use crate::simd::{pairs, row};
use crate::tensor::{Rows, Shape, TensorMut};
use std::ops::Range;

/// Query rows of a tile.
const ROWS: usize = 48;
/// Packed keys and values that may be in flight at once, in floats, beyond one head's.
const WAVE_FLOATS: usize = 2 << 20;

/// How a call is cut into parts and its workspace into pieces.
#[derive(Debug, Clone, Copy)]
struct Layout {
    /// Heads whose rows share tiles.
    fold: usize,
    /// Tile rows that a key/value head's query heads fall into.
    segments: usize,
    /// Query tiles of a segment.
    tiles: usize,
    /// Key tiles of a sequence.
    key_tiles: usize,
    /// Whether keys are packed beforehand.
    shared: bool,
    /// Floats of one packed key tile with its widened values.
    tile_floats: usize,
    /// Panels of keys by distance that are packed with a head's keys: where it has them for itself.
    distance_panels: usize,
    /// (Sequence, key/value head) pairs whose keys are packed at the same time.
    wave: usize,
    /// Floats of one thread.
    scratch: usize,
}

impl Layout {
    fn new(sizes: &Sizes) -> Layout {
        let group = sizes.group().max(1);
        let fold = if sizes.same_heads { group } else { 1 };
        // Without query heads there are no rows either.
        let tiles = (sizes.q.seq * fold.min(sizes.q.heads)).div_ceil(ROWS);
        let key_tiles = sizes.keys.div_ceil(KEY_TILE).max(1);
        let shared = tiles * (group / fold) > 1;
        let tile_floats = KEY_TILE * (sizes.q.dim + sizes.value_dim);
        let units = sizes.q.batch * sizes.kv_heads;
        let distance_panels = match sizes.by_distance && shared && group == 1 {
            true => Shared::panels(sizes.q.seq, sizes.keys),
            false => 0,
        };
        let unit = key_tiles * tile_floats + distance_panels * PANEL * sizes.q.dim;
        let fit = (WAVE_FLOATS / unit).max(1);
        let wave = if shared { fit.min(units.max(1)) } else { units.max(1) };
        let local = if shared { 0 } else { tile_floats };
        let rows = ROWS * (sizes.q.dim.next_multiple_of(16) + padded(sizes.value_dim) + 16 + 1);
        let band = if sizes.by_distance { Band::floats(ROWS, sizes.q.dim) } else { 0 };
        let scratch = rows + GROUP * KEY_TILE + band + local;
        Layout {
            fold,
            segments: group / fold,
            tiles,
            key_tiles,
            shared,
            tile_floats,
            distance_panels,
            wave,
            scratch,
        }
    }

    /// Floats of the packed keys of a wave, and of its keys by distance.
    fn shared_floats(&self, sizes: &Sizes) -> [usize; 2] {
        let keys = if self.shared { self.wave * self.key_tiles * self.tile_floats } else { 0 };
        [keys, self.wave * self.distance_panels * PANEL * sizes.q.dim]
    }
}

pub(crate) fn workspace_floats(sizes: &Sizes) -> usize {
    let layout = Layout::new(sizes);
    let threads = sizes.cpu.threads.count();
    let shared: usize = layout.shared_floats(sizes).iter().sum();
    (shared + threads * layout.scratch).max(threads * short::scratch(sizes))
}

/// Runs the call with the tiles whatever its size: `rows` of one (sequence, key/value head) in this thread.
pub(super) fn run_unit<E: Element, K: Element>(problem: &Problem<'_, E, K>, unit: usize) {
    let layout = Layout::new(&problem.sizes);
    // Keys are packed as they come, by rows that are computed a second time as well.
    let local = if layout.shared { layout.tile_floats } else { 0 };
    let scratch = layout.scratch + local;
    let layout = Layout { shared: false, distance_panels: 0, scratch, ..layout };
    let engine = Engine { problem, layout, factor: Factor::new(problem.scale) };
    let mut scratch = vec![0.0; layout.scratch];
    for part in 0..layout.segments * layout.tiles {
        let tile = engine.query_tile(unit, part / layout.tiles, part % layout.tiles);
        engine.attend(&tile, None, &mut scratch);
    }
}

/// Independent parts of the whole call.
pub(crate) fn parts(sizes: &Sizes) -> usize {
    let layout = Layout::new(sizes);
    sizes.q.batch * sizes.kv_heads * layout.segments * layout.tiles
}

/// Runs the call. `floats` is the workspace, of [`workspace_floats`].
pub(crate) fn run<E: Element, K: Element>(problem: &Problem<'_, E, K>, floats: &mut [f32]) {
    if short::fits(&problem.sizes, problem.terms) {
        return short::run(problem, floats);
    }
    let layout = Layout::new(&problem.sizes);
    let [keys, distances] = layout.shared_floats(&problem.sizes);
    let (shared, rest) = floats.split_at_mut(keys);
    let (distances, scratch) = rest.split_at_mut(distances);
    let units = problem.sizes.q.batch * problem.sizes.kv_heads;
    let engine = Engine { problem, layout, factor: Factor::new(problem.scale) };
    for first in (0..units).step_by(layout.wave) {
        let wave = first..(first + layout.wave).min(units);
        if layout.shared {
            engine.pack(wave.clone(), shared, scratch);
            engine.pack_distances(wave.clone(), distances, scratch);
        }
        let parts = wave.len() * layout.segments * layout.tiles;
        let (packed, distances, engine) = (&*shared, &*distances, &engine);
        for_each_part(parts, scratch.chunks_exact_mut(layout.scratch), |part, scratch| {
            // The last rows see most under a causal mask: they come first.
            let tile = layout.tiles - 1 - part % layout.tiles;
            let segment = part / layout.tiles % layout.segments;
            let n = part / (layout.tiles * layout.segments);
            let unit_floats = layout.key_tiles * layout.tile_floats;
            let tile = engine.query_tile(wave.start + n, segment, tile);
            let packed = layout.shared.then(|| Packed {
                keys: &packed[n * unit_floats..][..unit_floats],
                distances: engine.distances(&tile, n, distances),
            });
            engine.attend(&tile, packed, scratch);
        });
    }
}

/// Rows that are computed together.
#[derive(Debug, Clone)]
struct QueryTile {
    batch: usize,
    form: Form,
    kv_head: usize,
    first_head: usize,
    fold: usize,
    /// Rows, numbered position × fold + head.
    rows: Range<usize>,
    /// Position of query 0.
    origin: isize,
    /// Positions of the keys held.
    keys: Range<usize>,
}

impl QueryTile {
    fn query(&self, row: usize) -> (usize, usize) {
        (row / self.fold, self.first_head + row % self.fold)
    }

    fn position(&self, row: usize) -> isize {
        (row / self.fold) as isize + self.origin
    }

    fn site(&self, row: usize) -> Site {
        let q_head = self.query(row).1;
        Site { batch: self.batch, q_head, kv_head: self.kv_head }
    }

    fn row_site(&self, row: usize) -> RowSite {
        let (query, head) = self.query(row);
        RowSite { batch: self.batch, head, query, position: self.position(row) }
    }

    fn only(&self, row: usize) -> QueryTile {
        QueryTile { rows: row..row + 1, ..self.clone() }
    }
}

/// What is packed beforehand of a (sequence, key/value head).
#[derive(Debug, Clone, Copy)]
struct Packed<'a> {
    /// Tiles of keys and values.
    keys: &'a [f32],
    /// Keys by distance.
    distances: Option<Shared<'a>>,
}

struct Engine<'a, E, K> {
    problem: &'a Problem<'a, E, K>,
    layout: Layout,
    factor: Factor,
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// Cells of a query or key.
    fn depth(&self, tile: &QueryTile) -> usize {
        tile.form.cells(self.problem.sizes.q.dim)
    }

    fn query_tile(&self, unit: usize, segment: usize, tile: usize) -> QueryTile {
        let sizes = &self.problem.sizes;
        let (batch, kv_head) = (unit / sizes.kv_heads, unit % sizes.kv_heads);
        let fold = self.layout.fold;
        let keys = self.problem.kv.start(batch)..self.problem.kv.end(batch);
        QueryTile {
            batch,
            form: self.problem.form(batch),
            kv_head,
            first_head: kv_head * sizes.group() + segment * fold,
            fold,
            rows: tile * ROWS..((tile + 1) * ROWS).min(sizes.q.seq * fold),
            origin: keys.end as isize - sizes.q.seq as isize,
            keys,
        }
    }

    /// Packs the keys (and widens the values) of a wave of (sequence, key/value head) pairs, as far
    /// as some query may see them.
    fn pack(&self, wave: Range<usize>, shared: &mut [f32], scratch: &mut [f32]) {
        let Layout { key_tiles, tile_floats, .. } = self.layout;
        let shape = Shape { batch: wave.len(), seq: key_tiles, heads: 1, dim: tile_floats };
        let used = &mut shared[..wave.len() * key_tiles * tile_floats];
        let mut tiles = TensorMut::new(used, shape).expect("the workspace has this shape");
        let tiles = tiles.share();
        let scratches = scratch.chunks_exact_mut(self.layout.scratch);
        for_each_part(wave.len() * key_tiles, scratches, |part, _| {
            let (n, t) = (part / key_tiles, part % key_tiles);
            let whole = self.query_tile(wave.start + n, 0, 0);
            let start = whole.keys.start + t * KEY_TILE;
            let positions = start..(start + KEY_TILE).min(whole.keys.end);
            if !positions.is_empty() && self.seen(&whole, &positions) {
                // SAFETY: each part writes its own tile.
                let floats = unsafe { tiles.row(n, t, 0) };
                self.pack_tile(&whole, positions, floats);
            }
        });
    }

    /// Packs the keys by distance of a wave.
    fn pack_distances(&self, wave: Range<usize>, distances: &mut [f32], scratch: &mut [f32]) {
        let Some(encoding) = &self.problem.terms.encoding else { return };
        let (panels, dim) = (self.layout.distance_panels, self.problem.sizes.q.dim);
        let level = self.problem.sizes.cpu.level;
        let shape = Shape { batch: wave.len(), seq: panels, heads: 1, dim: PANEL * dim };
        let used = &mut distances[..wave.len() * panels * PANEL * dim];
        let mut tensor = TensorMut::new(used, shape).expect("the workspace has this shape");
        let tensor = tensor.share();
        let scratches = scratch.chunks_exact_mut(self.layout.scratch);
        for_each_part(wave.len() * panels, scratches, |part, scratch| {
            let (n, panel) = (part / panels, part % panels);
            let tile = self.query_tile(wave.start + n, 0, 0);
            let first = tile.keys.len() as isize - 1 - (panel * PANEL) as isize;
            // SAFETY: each part writes its own panel.
            let panel = unsafe { tensor.row(n, panel, 0) };
            let room = &mut scratch[..PANEL * dim];
            relative::pack(level, encoding, (tile.first_head, first), room, panel);
        });
    }

    /// The keys by distance of the `n`-th head of a wave, where they are shared.
    fn distances<'p>(&self, tile: &QueryTile, n: usize, packed: &'p [f32]) -> Option<Shared<'p>> {
        let dim = self.problem.sizes.q.dim;
        let floats = self.layout.distance_panels * PANEL * dim;
        let largest = tile.keys.len() as isize - 1;
        (floats > 0).then(|| Shared { panels: &packed[n * floats..][..floats], largest, dim })
    }

    /// Whether any query of the sequence may see any of the positions.
    fn seen(&self, any: &QueryTile, positions: &Range<usize>) -> bool {
        let sizes = &self.problem.sizes;
        let rows = any.origin..any.origin + sizes.q.seq as isize;
        let heads = if sizes.same_heads { 1 } else { sizes.group() };
        let Site { q_head: first, .. } = any.site(any.rows.start);
        (first..first + heads).any(|q_head| {
            let site = Site { q_head, ..any.site(any.rows.start) };
            sees(self.problem.mask, (site, rows.clone()), positions.clone())
        })
    }

    /// Packs the keys of one tile and, unless they are used where they lie, its values.
    fn pack_tile(&self, tile: &QueryTile, positions: Range<usize>, floats: &mut [f32]) {
        let kv = self.problem.kv.tile(tile.batch, tile.kv_head, positions);
        let (keys, values) = floats.split_at_mut(KEY_TILE * self.depth(tile));
        tile.form.pack_keys(kv.keys, keys);
        if !self.problem.kv.plain() {
            tile.form.pack_values(kv.values, values);
        }
    }

    /// Computes the rows of a tile from beginning to end and writes their outputs.
    fn attend(&self, tile: &QueryTile, packed: Option<Packed<'_>>, scratch: &mut [f32]) {
        let Problem { sizes, terms, .. } = self.problem;
        let mut state = State::new(scratch, (sizes, terms), tile.rows.len());
        self.accumulate(tile, packed, &mut state, false);
        for (r, row) in tile.rows.clone().enumerate() {
            let (acc, max, sum) = state.row(r);
            if sum.is_finite() && row::all_finite(self.problem.sizes.cpu.level, acc) {
                self.write(tile, row, (acc, max, sum));
            } else {
                self.attend_carefully(&tile.only(row), packed);
            }
        }
    }

    /// Computes a row again whose result is not finite, with the values that it may not see replaced
    /// by zeros: 0 × NaN must not reach it from there. What it may see, it gets. Allocates.
    fn attend_carefully(&self, tile: &QueryTile, packed: Option<Packed<'_>>) {
        let mut scratch = vec![0.0; self.layout.scratch];
        let Problem { sizes, terms, .. } = self.problem;
        let mut state = State::new(&mut scratch, (sizes, terms), 1);
        self.accumulate(tile, packed, &mut state, true);
        self.write(tile, tile.rows.start, state.row(0));
    }

    fn write(&self, tile: &QueryTile, row: usize, (acc, max, sum): (&[f32], f32, f32)) {
        let (i, head) = tile.query(row);
        // SAFETY: each row of the output belongs to one tile, each tile to one part.
        unsafe { self.problem.finish((tile.batch, i, head), acc, (max, sum)) };
    }

    /// Loads the queries and takes the tile through all keys that it may see.
    fn accumulate(
        &self,
        tile: &QueryTile,
        packed: Option<Packed<'_>>,
        state: &mut State<'_>,
        careful: bool,
    ) {
        let depth = self.depth(tile);
        for (r, row) in tile.rows.clone().enumerate() {
            let (i, head) = tile.query(row);
            let query = &mut state.queries[r * depth..(r + 1) * depth];
            self.factor.load(tile.form, self.problem.q.row(tile.batch, i, head), query);
            if let Some(band) = &mut state.band {
                band.load(self.factor, (r, head), query);
            }
        }
        let rows = tile.position(tile.rows.start)..tile.position(tile.rows.end - 1) + 1;
        let mut walk = Walk { engine: self, tile, packed, state, careful };
        let site = tile.site(tile.rows.start);
        let keys = tile.keys.clone();
        live_tiles(self.problem.mask, (site, rows), keys, &mut |positions, full| {
            walk.compute(positions, full);
        });
    }
}

/// Keys and values of one tile.
struct KeyTile<'a> {
    positions: &'a Range<usize>,
    /// Packed panels of cells.
    keys: &'a [f32],
    /// Rows of cells.
    values: Rows<'a, f32>,
    /// Columns of keys by distance that are shared.
    distances: Option<Columns<'a>>,
}

impl<E: Element, K: Element> Engine<'_, E, K> {
    /// One key tile for up to six rows of a query tile.
    fn group(
        &self,
        tile: &QueryTile,
        at: &KeyTile<'_>,
        (group, visible): (Range<usize>, Visible<'_>),
        state: &mut State<'_>,
    ) {
        let (&Engine { problem, factor, .. }, form) = (self, tile.form);
        let (sizes, level) = (&problem.sizes, problem.sizes.cpu.level);
        let (depth, width) = (self.depth(tile), padded(sizes.value_dim));
        let KeyTile { positions, keys, values, distances } = *at;
        let (mut tile_max, mut rescale) = ([0.0; GROUP], [0.0; GROUP]);
        let queries = &state.queries[group.start * depth..group.end * depth];
        let (out, hidden) = (&mut *state.scores, f32::NEG_INFINITY);
        let (rows, stride, max, out_stride) = (group.len(), depth, &mut tile_max, KEY_TILE);
        let product =
            Scores { queries, stride, rows, depth, keys, visible, hidden, out, out_stride, max };
        tile::scores(form, product);
        let band = state.band.as_mut();
        let by_distance = band.map(|band| band.products(group.clone(), visible, distances));
        let first = tile.rows.start;
        let rows = (first + group.start..first + group.end).map(|row| tile.row_site(row));
        let factor = problem.terms.finish(
            rows.clone(),
            Finish {
                level,
                factor,
                heads: sizes.q.heads,
                positions: positions.clone(),
                visible,
                by_distance,
                scores: state.scores,
                max: &mut tile_max,
                bend: None,
            },
        );
        tile::softmax(
            level,
            Softmax {
                scores: state.scores,
                max: &tile_max,
                visible,
                factor,
                running_max: &mut state.max[group.clone()],
                running_sum: &mut state.sum[group.start * 16..group.end * 16],
                rescale: &mut rescale,
            },
        );
        problem.terms.drop(level, rows, positions, state.scores);
        if let Form::Pairs(token) = form {
            let weights = &mut state.scores[..group.len() * KEY_TILE];
            pairs::round(token, weights, visible.all_steps());
        }
        let probabilities = &*state.scores;
        let out = &mut state.acc[group.start * width..group.end * width];
        tile::values(form, Values { probabilities, visible, values, rescale: &rescale, out });
    }
}

/// A pass of one query tile over its key tiles.
struct Walk<'w, 's, E, K> {
    engine: &'w Engine<'w, E, K>,
    tile: &'w QueryTile,
    packed: Option<Packed<'w>>,
    state: &'w mut State<'s>,
    careful: bool,
}

impl<'w, E: Element, K: Element> Walk<'w, '_, E, K> {
    /// One key tile for all rows of the query tile, six at a time.
    fn compute(&mut self, positions: Range<usize>, full: bool) {
        let Engine { problem, layout, .. } = *self.engine;
        let sizes = &problem.sizes;
        let rows = self.tile.rows.len();
        let mut words = [KeyWords::default(); ROWS];
        let all = full && positions.len().is_multiple_of(STEP) && !self.careful;
        if !all {
            self.fill(&positions, &mut words[..rows]);
        }
        // Lent out while groups of rows use the rest of the state.
        let local = std::mem::take(&mut self.state.local);
        let floats = match self.packed {
            Some(packed) => {
                let index = (positions.start - self.tile.keys.start) / KEY_TILE;
                &packed.keys[index * layout.tile_floats..][..layout.tile_floats]
            }
            None => {
                self.engine.pack_tile(self.tile, positions.clone(), local);
                &*local
            }
        };
        let depth = self.engine.depth(self.tile);
        let (keys, packed) = floats.split_at(KEY_TILE * depth);
        let keys = &keys[..positions.len().div_ceil(PANEL) * PANEL * depth];
        let width = sizes.value_dim;
        let kv = problem.kv.tile(self.tile.batch, self.tile.kv_head, positions.clone());
        let count = self.tile.form.cells(positions.len());
        let cells = |floats| Rows::new(floats, width, count, width).expect("a tile's values");
        let masked;
        let values = match kv.values {
            rows if self.careful => {
                masked = self.tile.form.seen_values(rows, &words[0]);
                cells(&masked)
            }
            KvValues::Rows(KvRows::F32(rows)) if problem.kv.plain() => rows,
            _ => cells(packed),
        };
        let distances = self.distances(positions.start);
        let tile = KeyTile { positions: &positions, keys, values, distances };
        let size = tile::group_size(rows);
        for first in (0..rows).step_by(size.max(1)) {
            let group = first..(first + size).min(rows);
            let visible = match all {
                true => Visible::All(positions.len()),
                false if words[group.clone()].iter().flatten().all(|&word| word == 0) => continue,
                false => Visible::Some(&words[group.clone()]),
            };
            self.engine.group(self.tile, &tile, (group, visible), self.state);
        }
        self.state.local = local;
    }

    /// Makes the columns of the tile's rows ready, against keys from a position on, unless they are shared.
    fn distances(&mut self, start: usize) -> Option<Columns<'w>> {
        let rows = self.tile.rows.len();
        let first = self.tile.position(self.tile.rows.end - 1) - start as isize;
        let shared = self.packed.and_then(|packed| packed.distances);
        match (&mut self.state.band, &shared) {
            (Some(band), Some(_)) => band.take(rows),
            (Some(band), None) => band.pack(self.tile.first_head, first, rows),
            (None, _) => {}
        }
        shared.map(|shared| shared.columns(first))
    }

    /// One bit for each (row, key) that the mask allows.
    fn fill(&self, positions: &Range<usize>, words: &mut [KeyWords]) {
        let used = positions.len().div_ceil(64);
        for (r, row) in self.tile.rows.clone().enumerate() {
            let same = r > 0 && !row.is_multiple_of(self.tile.fold);
            if same {
                words[r] = words[r - 1];
            } else {
                let (site, i) = (self.tile.site(row), self.tile.position(row));
                let bits = &mut words[r][..used];
                self.engine.problem.mask.fill(site, i, positions.clone(), bits);
            }
        }
    }
}

/// A thread's share of the workspace.
struct State<'a> {
    queries: &'a mut [f32],
    acc: &'a mut [f32],
    scores: &'a mut [f32],
    max: &'a mut [f32],
    sum: &'a mut [f32],
    /// Products by distance, where the call has a relative encoding.
    band: Option<Band<'a>>,
    /// A packed key tile with its widened values, where keys are not packed beforehand.
    local: &'a mut [f32],
}

impl<'a> State<'a> {
    fn new(scratch: &'a mut [f32], (sizes, terms): (&Sizes, &Terms<'a>), rows: usize) -> State<'a> {
        let (queries, rest) = scratch.split_at_mut(ROWS * sizes.q.dim.next_multiple_of(16));
        let (acc, rest) = rest.split_at_mut(ROWS * padded(sizes.value_dim));
        let (scores, rest) = rest.split_at_mut(GROUP * KEY_TILE);
        let (sum, rest) = rest.split_at_mut(ROWS * 16);
        let (max, rest) = rest.split_at_mut(ROWS);
        let (band, local) = Band::split(terms, sizes.cpu.level, ROWS, rest);
        acc[..rows * padded(sizes.value_dim)].fill(0.0);
        sum[..rows * 16].fill(0.0);
        max[..rows].fill(f32::NEG_INFINITY);
        State { queries, acc, scores, max, sum, band, local }
    }

    /// Accumulator, maximum and sum of a row.
    fn row(&self, r: usize) -> (&[f32], f32, f32) {
        let width = self.acc.len() / ROWS;
        let sum = tile::lane_sum(&self.sum[r * 16..(r + 1) * 16]);
        (&self.acc[r * width..(r + 1) * width], self.max[r], sum)
    }
}
