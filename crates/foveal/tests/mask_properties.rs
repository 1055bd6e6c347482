//! Every pattern's fast answers against its definition: `live` and `fill` agree with `allows`.

mod support;

use foveal::Mask;
use foveal::mask::{
    Band, BlockSize, Blocks, Coverage, Dense, Documents, Extent, FILL_LIMIT, Keys, Pattern, Prefix,
    Site, Tree,
};
use std::ops::Range;
use support::Random;

const SITES: [Site; 3] = [
    Site { batch: 0, q_head: 0, kv_head: 0 },
    Site { batch: 1, q_head: 1, kv_head: 0 },
    Site { batch: 1, q_head: 3, kv_head: 1 },
];
const BATCH: usize = 2;
const HEADS: usize = 4;

/// A pattern of a caller's that defines nothing but `allows`.
#[derive(Debug)]
struct EveryThird;

impl Pattern for EveryThird {
    fn allows(&self, at: Site, i: isize, j: usize) -> bool {
        (i + j as isize + at.q_head as isize).rem_euclid(3) == 0
    }
}

/// Cumulative lengths of `count` documents, some of them empty.
fn random_starts(random: &mut Random, count: usize, total: usize) -> Vec<usize> {
    let mut starts: Vec<_> = (1..count).map(|_| random.below(total + 1)).collect();
    starts.extend([0, total]);
    starts.sort_unstable();
    starts
}

/// A random mask of which about `percent` of 100 is visible, in runs so that words of all zeros and of
/// all ones occur.
fn random_dense(random: &mut Random, extent: Extent, percent: usize) -> Mask {
    let len = extent.batch * extent.heads * extent.queries * extent.keys;
    let mut visible = Vec::with_capacity(len);
    while visible.len() < len {
        let run = 1 + random.below(extent.keys);
        let value = random.below(100) < percent;
        visible.extend((0..run.min(len - visible.len())).map(|_| value));
    }
    Dense::new(&visible, extent).unwrap().into()
}

/// All patterns for `queries` rows and `keys` keys, with names for messages.
fn patterns(queries: usize, keys: usize, random: &mut Random) -> Vec<Mask> {
    let mut masks = vec![Mask::full(), Mask::causal(), Mask::pattern(EveryThird)];
    masks.extend((0..=5).map(Mask::window));
    masks.extend(bands().map(|band| Mask::band(band.behind, band.ahead)));
    masks.extend(documents(queries, keys, random));
    let extent = |batch, heads| Extent { batch, heads, queries, keys };
    masks.push(random_dense(random, extent(1, 1), 50));
    masks.push(random_dense(random, extent(BATCH, 1), 90));
    masks.push(random_dense(random, extent(BATCH, HEADS), 10));
    masks.extend(by_length(keys, random));
    masks.extend((0..8).map(|_| random_blocks(random, queries, keys)));
    masks.extend((0..3).map(|_| random_tree(random, keys)));
    let choices = [choice(&masks, HEADS, random), choice(&masks, BATCH, random)];
    masks.extend([Mask::per_head(choices[0].clone()), Mask::per_sequence(choices[1].clone())]);
    masks.extend(compositions(&masks, random));
    masks
}

/// Prefixes, padding and streaming, for one sequence and for all.
fn by_length(keys: usize, random: &mut Random) -> Vec<Mask> {
    let mut length = || random.below(keys + 2);
    vec![
        Mask::prefix(length()),
        Prefix::new(&[length(), length()]).into(),
        Mask::keys(length()..length()),
        Mask::key_lengths(&[length(), length()]),
        Mask::left_padding(&[length(), length()]),
        Keys::new(vec![length()..keys, 0..length()]).into(),
        Mask::streaming(length(), length()),
        Mask::streaming(2, 3),
    ]
}

/// Blocks of random sizes, shared or not, that may cover less than all queries and keys.
fn random_blocks(random: &mut Random, queries: usize, keys: usize) -> Mask {
    let mut size = |most: usize| 1 + random.below(most.max(1));
    let size = BlockSize { queries: size(queries / 2), keys: size(keys / 2) };
    let (rows, columns) = match random.below(4) {
        0 => (queries.max(keys).div_ceil(3), keys.div_ceil(2 * size.keys)),
        _ => (queries.max(keys).div_ceil(size.queries), keys.div_ceil(size.keys)),
    };
    let (batch, heads) = [(1, 1), (BATCH, 1), (1, HEADS), (BATCH, HEADS)][random.below(4)];
    let layout = Extent { batch, heads, queries: rows, keys: columns };
    let percent = [10, 50, 90][random.below(3)];
    let visible: Vec<_> =
        (0..batch * heads * rows * columns).map(|_| random.below(100) < percent).collect();
    let blocks = Blocks::new(&visible, layout, size).unwrap();
    if random.below(2) == 0 { blocks.into() } else { blocks.by_query(queries, keys).into() }
}

/// A tree behind some of the keys, or behind more than there are.
fn random_tree(random: &mut Random, keys: usize) -> Mask {
    let before = random.below(keys + 2);
    let count = keys.saturating_sub(before) + random.below(2);
    let parents: Vec<_> = (0..count)
        .map(|n| if n == 0 || random.below(4) == 0 { None } else { Some(random.below(n)) })
        .collect();
    Tree::new(before, &parents).unwrap().into()
}

fn choice(masks: &[Mask], count: usize, random: &mut Random) -> Vec<Mask> {
    (0..count).map(|_| masks[random.below(masks.len())].clone()).collect()
}

fn bands() -> impl Iterator<Item = Band> {
    let ends = [None, Some(0), Some(1), Some(3), Some(usize::MAX)];
    ends.into_iter()
        .flat_map(move |behind| ends.into_iter().map(move |ahead| Band { behind, ahead }))
}

fn documents(queries: usize, keys: usize, random: &mut Random) -> Vec<Mask> {
    let mut masks = vec![];
    for count in [1, 2, 5] {
        let mut add = |query_starts: &[usize], key_starts: &[usize]| {
            let documents = Documents::new(query_starts, key_starts).unwrap();
            masks.push(documents.clone().into());
            masks.extend(bands().map(|band| Mask::from(documents.clone().within(band))));
        };
        add(&random_starts(random, count, queries), &random_starts(random, count, keys));
        if queries == keys {
            let starts = random_starts(random, count, queries);
            add(&starts, &starts);
        }
    }
    masks
}

/// Random pairs of the masks given, and pairs of such pairs.
fn compositions(masks: &[Mask], random: &mut Random) -> Vec<Mask> {
    fn join(pool: &[Mask], random: &mut Random) -> Mask {
        let mut pick = || pool[random.below(pool.len())].clone();
        let (a, b) = (pick(), pick());
        if random.below(2) == 0 { a.and(b) } else { a.or(b) }
    }
    let pairs: Vec<_> = (0..24).map(|_| join(masks, random)).collect();
    let nested: Vec<_> = (0..24).map(|_| join(&pairs, random)).collect();
    pairs.into_iter().chain(nested).collect()
}

/// A mask in one call: what `allows` says, and messages that name the place.
struct Case<'a> {
    mask: &'a Mask,
    at: Site,
    queries: usize,
    keys: usize,
}

impl Case<'_> {
    fn name(&self) -> String {
        format!("{:?} for {:?} with T {} S {}", self.mask, self.at, self.queries, self.keys)
    }

    /// The absolute position of row `r`, which may be one past the call's rows.
    fn position(&self, r: usize) -> isize {
        r as isize + self.keys as isize - self.queries as isize
    }

    fn check_live(&self, rows: Range<usize>, keys: Range<usize>) {
        let place = || format!("{} live({rows:?}, {keys:?})", self.name());
        let positions = self.position(rows.start)..self.position(rows.end);
        let allowed = |j| positions.clone().map(move |i| self.mask.allows(self.at, i, j));
        let mut next = keys.start;
        self.mask.live(self.at, positions.clone(), keys.clone(), &mut |range, coverage| {
            assert!(range.start < range.end, "{}: empty range {range:?}", place());
            assert!(next <= range.start, "{}: {range:?} after {next}", place());
            assert!(range.end <= keys.end, "{}: {range:?} sticks out", place());
            for j in next..range.start {
                assert!(!allowed(j).any(|seen| seen), "{}: key {j} is left out", place());
            }
            if coverage == Coverage::Full {
                for j in range.clone() {
                    assert!(allowed(j).all(|seen| seen), "{}: key {j} is not full", place());
                }
            }
            next = range.end;
        });
        for j in next..keys.end {
            assert!(!allowed(j).any(|seen| seen), "{}: key {j} is left out", place());
        }
    }

    fn check_fill(&self, row: usize, keys: Range<usize>) {
        let i = self.position(row);
        for count in [keys.len().div_ceil(64), FILL_LIMIT / 64] {
            let mut words = vec![u64::MAX; count];
            self.mask.fill(self.at, i, keys.clone(), &mut words);
            for b in 0..words.len() * 64 {
                let expected = b < keys.len() && self.mask.allows(self.at, i, keys.start + b);
                let got = words[b / 64] >> (b % 64) & 1 == 1;
                let place = || format!("{} fill({i}, {keys:?}) bit {b}", self.name());
                assert_eq!(got, expected, "{}", place());
            }
        }
    }
}

fn sub_ranges(end: usize) -> impl Iterator<Item = Range<usize>> {
    (0..=end).flat_map(move |a| (a..=end).map(move |b| a..b))
}

#[test]
fn live_and_fill_agree_with_allows_on_all_small_sizes() {
    let mut random = Random::new(1);
    for (queries, keys) in (0..=9).flat_map(|t| (0..=9).map(move |s| (t, s))) {
        for (n, mask) in patterns(queries, keys, &mut random).iter().enumerate() {
            let case = Case { mask, at: SITES[n % SITES.len()], queries, keys };
            for key_range in sub_ranges(keys + 1) {
                sub_ranges(queries).for_each(|rows| case.check_live(rows, key_range.clone()));
                (0..queries).for_each(|row| case.check_fill(row, key_range.clone()));
            }
        }
    }
}

#[test]
fn live_and_fill_agree_with_allows_around_tiles_and_words() {
    let mut random = Random::new(2);
    for (queries, keys) in
        [(255, 256), (256, 255), (257, 260), (260, 257), (300, 300), (1, 300), (64, 65), (300, 129)]
    {
        for mask in &patterns(queries, keys, &mut random) {
            for at in SITES {
                let case = Case { mask, at, queries, keys };
                let mut range = |end: usize| {
                    let (a, b) = (random.below(end + 1), random.below(end + 1));
                    a.min(b)..a.max(b)
                };
                for _ in 0..6 {
                    case.check_live(range(queries), range(keys + 1));
                    let rows = range(queries).start;
                    case.check_live(rows..(rows + 6).min(queries), range(keys));
                    let fill = range(keys + 1);
                    let end = fill.end.min(fill.start + FILL_LIMIT);
                    case.check_fill(range(queries - 1).end, fill.start..end);
                }
                case.check_live(0..queries, 0..keys);
            }
        }
    }
}

#[test]
fn typed_masks_name_full_ranges_and_skip_what_nobody_sees() {
    use Coverage::{Full, Partial};
    let live = |mask: &Mask, rows: Range<isize>| {
        let mut ranges = vec![];
        mask.live(SITES[0], rows, 0..300, &mut |range, coverage| ranges.push((range, coverage)));
        ranges
    };
    assert_eq!(live(&Mask::full(), 0..4), [(0..300, Full)]);
    assert_eq!(live(&Mask::causal(), 10..20), [(0..11, Full), (11..20, Partial)]);
    let window = [(91..101, Partial), (101..111, Full), (111..121, Partial)];
    assert_eq!(live(&Mask::window(20), 110..121), window);
    assert_eq!(live(&Mask::causal(), -5..-1), []);
    let starts = [0, 100, 100, 250, 300];
    let packed = Mask::documents(&starts).unwrap();
    assert_eq!(live(&packed, 120..130), [(100..250, Full)]);
    assert_eq!(live(&packed, 240..260), [(100..250, Partial), (250..300, Partial)]);
    let causal = [(100..121, Full), (121..130, Partial)];
    assert_eq!(live(&packed.and(Mask::causal()), 120..130), causal);
}

#[test]
fn heads_with_one_pattern_have_one_pattern() {
    let mut random = Random::new(3);
    let (queries, keys) = (7, 9);
    for mask in patterns(queries, keys, &mut random).iter().filter(|mask| mask.same_for_all_heads())
    {
        for (i, j) in (-2..7).flat_map(|i| (0..keys).map(move |j| (i, j))) {
            let seen = |q_head| mask.allows(Site { batch: 1, q_head, kv_head: q_head / 2 }, i, j);
            assert!((1..HEADS).all(|head| seen(head) == seen(0)), "{mask:?} at ({i}, {j})");
        }
    }
}

#[test]
fn typed_masks_mean_what_their_names_say() {
    let at = SITES[0];
    for (i, j) in (-4..12isize).flat_map(|i| (0..12usize).map(move |j| (i, j))) {
        let distance = i - j as isize;
        assert!(Mask::full().allows(at, i, j));
        assert_eq!(Mask::causal().allows(at, i, j), distance >= 0);
        for width in 0..5 {
            let inside = (0..width as isize).contains(&distance);
            assert_eq!(Mask::window(width).allows(at, i, j), inside, "window {width} ({i}, {j})");
        }
        let band = Mask::band(Some(2), Some(1));
        assert_eq!(band.allows(at, i, j), (-1..=2).contains(&distance), "band ({i}, {j})");
    }
}

#[test]
fn documents_are_what_they_would_be_alone() {
    let mut random = Random::new(4);
    for (queries, keys) in [(9, 9), (9, 12), (12, 7)] {
        let (query_starts, key_starts) =
            (random_starts(&mut random, 4, queries), random_starts(&mut random, 4, keys));
        for band in bands() {
            let packed =
                Mask::from(Documents::new(&query_starts, &key_starts).unwrap().within(band));
            let alone = Mask::band(band.behind, band.ahead);
            for (r, j) in (0..queries).flat_map(|r| (0..keys).map(move |j| (r, j))) {
                let expected = (0..4).any(|d| {
                    let (rows, keys) =
                        (query_starts[d]..query_starts[d + 1], key_starts[d]..key_starts[d + 1]);
                    let place = r as isize - rows.start as isize + keys.len() as isize
                        - rows.len() as isize;
                    rows.contains(&r)
                        && keys.contains(&j)
                        && alone.allows(SITES[0], place, j - keys.start)
                });
                let i = r as isize + keys as isize - queries as isize;
                let place =
                    format!("{query_starts:?} {key_starts:?} within {band:?}: row {r} key {j}");
                assert_eq!(packed.allows(SITES[0], i, j), expected, "{place}");
            }
        }
    }
}

#[test]
fn dense_masks_and_documents_refuse_other_lengths() {
    let extent = Extent { batch: 2, heads: 4, queries: 3, keys: 5 };
    let dense = Mask::from(Dense::new(&[true; 2 * 3 * 5], Extent { heads: 1, ..extent }).unwrap());
    let packed = Mask::from(Documents::new(&[0, 1, 3], &[0, 5, 5]).unwrap());
    for mask in
        [dense.clone(), packed.clone(), Mask::causal().and(dense), packed.or(Mask::causal())]
    {
        assert!(mask.check(extent).is_ok(), "{mask:?}");
        assert!(mask.check(Extent { keys: 6, ..extent }).is_err(), "{mask:?}");
        assert!(mask.check(Extent { queries: 2, ..extent }).is_err(), "{mask:?}");
    }
    assert!(Dense::new(&[true; 4], extent).is_err());
    for starts in [&[][..], &[1, 2], &[0, 3, 2]] {
        assert!(Mask::documents(starts).is_err(), "{starts:?}");
    }
    assert!(Documents::new(&[0, 3], &[0, 1, 3]).is_err());
}
