//! What each kind of mask means, said a second time: definitions, refusals, words.

mod support;

use foveal::Mask;
use foveal::mask::{
    BlockSize, Blocks, Coverage, Dense, Documents, Extent, MAX_TREE, Pattern, Prefix, Site, Tree,
};
use std::ops::Range;
use support::Random;

const AT: Site = Site { batch: 0, q_head: 0, kv_head: 0 };

fn sites(extent: Extent) -> impl Iterator<Item = Site> {
    let Extent { batch, heads, .. } = extent;
    (0..batch)
        .flat_map(move |b| (0..heads).map(move |h| Site { batch: b, q_head: h, kv_head: h / 2 }))
}

/// Every (query position, key) of a call.
fn pairs(queries: usize, keys: usize) -> impl Iterator<Item = (isize, usize)> {
    let position = move |row: usize| row as isize + keys as isize - queries as isize;
    (0..queries).flat_map(move |row| (0..keys).map(move |j| (position(row), j)))
}

/// Requires that two masks allow the same in a call.
fn same(a: &Mask, b: &Mask, extent: Extent) {
    for at in sites(extent) {
        for (i, j) in pairs(extent.queries, extent.keys) {
            assert_eq!(a.allows(at, i, j), b.allows(at, i, j), "{a} and {b}: {at:?} ({i}, {j})");
        }
    }
}

fn live(mask: &Mask, rows: Range<isize>, keys: Range<usize>) -> Vec<(Range<usize>, Coverage)> {
    let mut ranges = vec![];
    mask.live(AT, rows, keys, &mut |range, coverage| ranges.push((range, coverage)));
    ranges
}

#[test]
fn a_prefix_is_seen_by_all_and_the_rest_is_causal() {
    for length in 0..10 {
        for (i, j) in pairs(12, 9) {
            let expected = j < length || j as isize <= i;
            assert_eq!(Mask::prefix(length).allows(AT, i, j), expected, "{length} ({i}, {j})");
        }
    }
    use Coverage::{Full, Partial};
    assert_eq!(live(&Mask::prefix(100), 20..60, 0..300), [(0..100, Full)]);
    assert_eq!(live(&Mask::prefix(10), 20..60, 0..300), [(0..21, Full), (21..60, Partial)]);
    let extent = Extent { batch: 2, heads: 2, queries: 6, keys: 6 };
    let each = Mask::per_sequence(vec![Mask::prefix(2), Mask::prefix(4)]);
    same(&Prefix::new(&[2, 4]).into(), &each, extent);
}

#[test]
fn padding_hides_keys_on_its_side() {
    for (i, j) in pairs(3, 8) {
        for batch in 0..2 {
            let at = Site { batch, ..AT };
            assert_eq!(Mask::key_lengths(&[5, 0]).allows(at, i, j), j < [5, 0][batch]);
            assert_eq!(Mask::left_padding(&[5, 0]).allows(at, i, j), j >= [5, 0][batch]);
        }
        assert_eq!(Mask::keys(2..4).allows(AT, i, j), (2..4).contains(&j));
    }
}

#[test]
fn streaming_sees_the_first_tokens_and_the_newest() {
    for (sinks, width) in (0..4).flat_map(|s| (0..5).map(move |w| (s, w))) {
        let mask = Mask::streaming(sinks, width);
        for (i, j) in pairs(12, 10) {
            let behind = i - j as isize;
            let expected = behind >= 0 && (j < sinks || behind < width as isize);
            assert_eq!(mask.allows(AT, i, j), expected, "{mask} ({i}, {j})");
        }
    }
}

#[test]
fn streaming_costs_a_few_ranges_however_long_the_sequence() {
    use Coverage::{Full, Partial};
    let ranges = live(&Mask::streaming(4, 1000), 1_000_000..1_000_048, 0..2_000_000);
    let window =
        [(999_001..999_048, Partial), (999_048..1_000_001, Full), (1_000_001..1_000_048, Partial)];
    assert_eq!(ranges[0], (0..4, Full));
    assert_eq!(ranges[1..], window);
    assert_eq!(live(&Mask::streaming(4, 0), 1_000_000..1_000_048, 0..2_000_000), [(0..4, Full)]);
}

/// The layout's blocks pair by pair, as a dense mask.
fn spread(visible: &[bool], layout: Extent, size: BlockSize, extent: Extent) -> Mask {
    let Extent { queries, keys, .. } = extent;
    let mut dense = vec![];
    for head in 0..layout.batch * layout.heads {
        for (row, j) in (0..queries).flat_map(|row| (0..keys).map(move |j| (row, j))) {
            let block = row / size.queries * layout.keys + j / size.keys;
            dense.push(visible[head * layout.queries * layout.keys + block]);
        }
    }
    let extent = Extent { batch: layout.batch, heads: layout.heads, queries, keys };
    Dense::new(&dense, extent).unwrap().into()
}

#[test]
fn blocks_are_dense_masks_written_small() {
    let mut random = Random::new(5);
    for (size, (queries, keys)) in [(1, 1), (2, 3), (3, 70), (64, 64)]
        .into_iter()
        .flat_map(|size| [(9, 9), (5, 130), (130, 5), (70, 70)].map(|lengths| (size, lengths)))
    {
        let size = BlockSize { queries: size.0, keys: size.1 };
        for (batch, heads) in [(1, 1), (2, 1), (2, 4)] {
            let extent = Extent { batch: 2, heads: 4, queries, keys };
            let rows = queries.div_ceil(size.queries);
            let layout = Extent { batch, heads, queries: rows, keys: keys.div_ceil(size.keys) };
            let count = batch * heads * rows * layout.keys;
            let visible: Vec<_> = (0..count).map(|_| random.below(3) == 0).collect();
            let blocks = Blocks::new(&visible, layout, size).unwrap();
            let by_query = Mask::from(blocks.clone().by_query(queries, keys));
            by_query.check(extent).unwrap();
            same(&by_query, &spread(&visible, layout, size, extent), extent);
            if queries == keys {
                same(&by_query, &blocks.into(), extent);
            }
        }
    }
}

#[test]
fn blocks_by_position_do_not_change_with_the_call() {
    let layout = Extent { batch: 1, heads: 1, queries: 4, keys: 4 };
    let visible: Vec<_> = (0..16).map(|n| n % 4 <= n / 4).collect();
    let size = BlockSize { queries: 64, keys: 64 };
    let mask = Mask::from(Blocks::new(&visible, layout, size).unwrap());
    let extent = |queries, keys| Extent { batch: 3, heads: 2, queries, keys };
    for (queries, keys) in [(256, 256), (1, 200), (100, 250)] {
        mask.check(extent(queries, keys)).unwrap();
    }
    assert_eq!(live(&mask, 130..180, 0..250), [(0..192, Coverage::Full)]);
    assert_eq!(
        live(&mask, 120..180, 0..250),
        [(0..128, Coverage::Full), (128..192, Coverage::Partial)]
    );
    assert_eq!(live(&mask, 250..260, 192..256), [(192..256, Coverage::Partial)]);
    assert!(mask.check(extent(1, 257)).is_err());
    assert!(mask.check(extent(9, 8)).is_err());
}

#[test]
fn a_tree_token_sees_what_comes_before_the_tree_its_ancestors_and_itself() {
    let mut random = Random::new(6);
    for before in [0, 1, 5, 70] {
        for count in [0, 1, 3, 9, 66] {
            let parents: Vec<Option<usize>> = (0..count)
                .map(|n| (n > 0 && random.below(5) > 0).then(|| random.below(n)))
                .collect();
            let mask = Mask::from(Tree::new(before, &parents).unwrap());
            let follows = |mut node: usize, ancestor: usize| loop {
                if node == ancestor {
                    return true;
                }
                match parents[node] {
                    Some(parent) => node = parent,
                    None => return false,
                }
            };
            for (i, j) in pairs(before + count, before + count) {
                let n = i as usize;
                let expected = match (n.checked_sub(before), j.checked_sub(before)) {
                    (Some(_), None) => true,
                    (Some(node), Some(ancestor)) => follows(node, ancestor),
                    (None, _) => j <= n,
                };
                assert_eq!(mask.allows(AT, i, j), expected, "{parents:?} ({i}, {j})");
            }
        }
    }
}

#[test]
fn a_chain_is_causal() {
    let parents: Vec<_> = (0..20usize).map(|n| n.checked_sub(1)).collect();
    let tree = Mask::from(Tree::new(30, &parents).unwrap());
    same(&tree, &Mask::causal(), Extent { batch: 1, heads: 1, queries: 50, keys: 50 });
}

#[test]
fn choices_ask_the_mask_of_the_head_or_sequence() {
    let masks = vec![Mask::causal(), Mask::window(2), Mask::full()];
    let by_head = Mask::per_head(masks.clone());
    let by_sequence = Mask::per_sequence(masks.clone());
    for at in sites(Extent { batch: 4, heads: 4, queries: 5, keys: 5 }) {
        for (i, j) in pairs(5, 5) {
            let of = |n: usize| masks.get(n).is_some_and(|mask| mask.allows(at, i, j));
            assert_eq!(by_head.allows(at, i, j), of(at.q_head));
            assert_eq!(by_sequence.allows(at, i, j), of(at.batch));
        }
    }
    assert!(!by_head.same_for_all_heads());
    assert!(by_sequence.same_for_all_heads());
    assert!(!Mask::per_sequence(vec![by_head]).same_for_all_heads());
}

#[test]
fn masks_refuse_calls_that_they_were_not_made_for() {
    let extent = Extent { batch: 3, heads: 4, queries: 5, keys: 9 };
    let blocks = |batch, heads, queries, keys| {
        let layout = Extent { batch, heads, queries, keys };
        let size = BlockSize { queries: 2, keys: 3 };
        Blocks::new(&vec![true; batch * heads * queries * keys], layout, size).unwrap()
    };
    let parents: Vec<_> = (0..4usize).map(|n| n.checked_sub(1)).collect();
    let tree = |before| Mask::from(Tree::new(before, &parents).unwrap());
    let fit: [Mask; 12] = [
        Mask::prefix(7),
        Prefix::new(&[1, 2, 3]).into(),
        Mask::key_lengths(&[4, 0, 100]),
        Mask::left_padding(&[4]),
        blocks(1, 1, 5, 3).into(),
        blocks(3, 4, 5, 3).into(),
        blocks(1, 4, 3, 3).by_query(5, 9).into(),
        tree(5),
        tree(6),
        Mask::per_head(vec![Mask::full(); 4]),
        Mask::per_sequence(vec![tree(5), Mask::causal(), Mask::full()]),
        Mask::per_sequence(vec![Mask::full(); 3]).and(Mask::causal()),
    ];
    for mask in &fit {
        mask.check(extent).unwrap_or_else(|error| panic!("{mask}: {error}"));
        mask.check_sequence(2, extent).unwrap_or_else(|error| panic!("{mask}: {error}"));
    }
    let unfit: [Mask; 14] = [
        Prefix::new(&[1, 2]).into(),
        Prefix::new(&[]).into(),
        Mask::key_lengths(&[4, 0]),
        Mask::left_padding(&[4, 1, 2, 3]),
        blocks(2, 1, 5, 3).into(),
        blocks(1, 2, 5, 3).into(),
        blocks(1, 1, 4, 3).into(),
        blocks(1, 1, 5, 2).into(),
        blocks(1, 1, 2, 3).by_query(5, 9).into(),
        blocks(1, 1, 3, 3).by_query(6, 9).into(),
        tree(4),
        Mask::per_head(vec![Mask::full(); 3]),
        Mask::per_sequence(vec![Mask::full(); 4]).or(Mask::causal()),
        Mask::per_head(vec![Mask::full(), Mask::full(), tree(4), Mask::full()]),
    ];
    for mask in &unfit {
        assert!(mask.check(extent).is_err(), "{mask}");
        assert!(mask.check_sequence(0, extent).is_err(), "{mask}");
    }
}

/// With caches of different lengths, each sequence's mask answers for its own.
#[test]
fn sequences_of_different_lengths_ask_their_own_masks() {
    let trees = [3, 8].map(|before| Mask::from(Tree::new(before, &[None, None]).unwrap()));
    let mask = Mask::per_sequence(trees.to_vec()).and(Mask::causal().or(Mask::prefix(1)));
    let extent = |keys| Extent { batch: 2, heads: 1, queries: 2, keys };
    mask.check_sequence(0, extent(5)).unwrap();
    mask.check_sequence(1, extent(10)).unwrap();
    assert!(mask.check_sequence(0, extent(10)).is_err());
    assert!(mask.check(extent(10)).is_err());
}

#[test]
fn makers_refuse_what_makes_no_sense() {
    let layout = Extent { batch: 1, heads: 1, queries: 2, keys: 2 };
    for (queries, keys) in [(0, 1), (1, 0)] {
        assert!(Blocks::new(&[true; 4], layout, BlockSize { queries, keys }).is_err());
    }
    assert!(Blocks::new(&[true; 5], layout, BlockSize { queries: 1, keys: 1 }).is_err());
    let huge = Extent { queries: usize::MAX, ..layout };
    assert!(Blocks::new(&[true; 4], huge, BlockSize { queries: 1, keys: 1 }).is_err());
    for parents in [&[Some(0)][..], &[None, Some(2), None]] {
        assert!(Tree::new(9, parents).is_err(), "{parents:?}");
    }
    assert!(Tree::new(0, &vec![None; MAX_TREE + 1]).is_err());
}

/// Documents of no queries, of no keys and of neither leave the others alone.
#[test]
fn empty_documents_see_nothing_and_are_not_seen() {
    let mask = Mask::from(Documents::new(&[0, 2, 2, 5, 5], &[0, 3, 5, 5, 5]).unwrap());
    let extent = Extent { batch: 1, heads: 1, queries: 5, keys: 5 };
    mask.check(extent).unwrap();
    for (i, j) in pairs(5, 5) {
        assert_eq!(mask.allows(AT, i, j), i < 2 && j < 3, "({i}, {j})");
    }
    let none = Mask::documents(&[0]).unwrap();
    none.check(Extent { queries: 0, keys: 0, ..extent }).unwrap();
    assert!(none.check(extent).is_err());
    assert!(!none.allows(AT, 0, 0));
}

#[test]
fn nothing_overflows_at_the_ends_of_positions() {
    let size = BlockSize { queries: usize::MAX, keys: usize::MAX };
    let layout = Extent { batch: 1, heads: 1, queries: 2, keys: 2 };
    let blocks = Blocks::new(&[true; 4], layout, size).unwrap();
    let masks: [Mask; 5] = [
        Mask::prefix(usize::MAX),
        Mask::keys(usize::MAX - 1..usize::MAX),
        Mask::streaming(usize::MAX, usize::MAX),
        blocks.into(),
        Tree::new(usize::MAX, &[None]).unwrap().into(),
    ];
    let last = isize::MAX;
    for mask in &masks {
        for (rows, keys) in
            [(last - 1..last, usize::MAX - 9..usize::MAX), (-last - 1..-last, 0..5), (0..1, 0..5)]
        {
            let mut bits = [0];
            mask.fill(AT, rows.start, keys.clone(), &mut bits);
            let seen = keys.clone().filter(|&j| mask.allows(AT, rows.start, j)).count();
            assert_eq!(bits[0].count_ones() as usize, seen, "{mask}");
            let live: usize = live(mask, rows, keys).iter().map(|(range, _)| range.len()).sum();
            assert_eq!(live, seen, "{mask}");
        }
    }
}

#[test]
fn masks_say_what_they_are() {
    let layout = Extent { batch: 1, heads: 1, queries: 2, keys: 2 };
    let size = BlockSize { queries: 64, keys: 128 };
    let blocks = Blocks::new(&[true, false, true, true], layout, size).unwrap();
    let words = [
        (Mask::prefix(12), "prefix 12"),
        (Prefix::new(&[1, 2]).into(), "prefixes of 2 sequences"),
        (Mask::keys(3..9), "keys 3..9"),
        (Mask::left_padding(&[3]), "keys from 3"),
        (Mask::key_lengths(&[3, 4]), "keys of 2 sequences"),
        (Mask::streaming(4, 100), "first 4 and window 100"),
        (Mask::window(0), "nothing"),
        (Mask::from(blocks).and(Mask::causal()), "(blocks of 64 by 128, 3 of 4 live and causal)"),
        (Tree::new(9, &[None, Some(0)]).unwrap().into(), "tree of 2 tokens behind 9"),
        (
            Mask::per_head(vec![Mask::causal(), Mask::causal(), Mask::window(4)]),
            "by head (0 to 1: causal, 2: window 4)",
        ),
        (Mask::per_sequence(vec![Mask::full()]), "by sequence (0: full)"),
    ];
    for (mask, expected) in words {
        assert_eq!(mask.to_string(), expected);
    }
}
