//! A pool of pages against lists of numbers, through any appends, forks, frees and forgetting.

use crate::numbers::Numbers;
use arbitrary::Unstructured;
use foveal::cache::{KvRows, KvStore, PagePool, PagedCache, TILE};
use foveal::{Error, Shape, Tensor};
use std::collections::HashMap;

const KV_HEADS: usize = 2;
const DIMS: (usize, usize) = (3, 1);
/// Sequences at once.
const MOST: usize = 8;

/// What a sequence should hold: a number for each position since its beginning, of which its keys and values are made.
struct Model {
    cache: PagedCache<f32>,
    start: usize,
    marks: Vec<f32>,
}

/// The key (or value) of a head at a position with this mark.
fn row(mark: f32, head: usize, dim: usize) -> Vec<f32> {
    (0..dim).map(|n| mark + (head * 10 + n) as f32).collect()
}

fn tensor(marks: &[f32], dim: usize) -> Tensor<f32> {
    let shape = Shape { batch: 1, seq: marks.len(), heads: KV_HEADS, dim };
    let heads = |&mark: &f32| (0..KV_HEADS).flat_map(move |head| row(mark, head, dim));
    Tensor::from_vec(marks.iter().flat_map(heads).collect(), shape).expect("as many as the shape")
}

/// Operations on a pool of a few pages.
pub(crate) fn pool(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let pages = input.int_in_range(0..=9)?;
    let pool = PagePool::<f32>::new(KV_HEADS, DIMS, pages).expect("a small pool");
    let mut numbers = Numbers::new(input.arbitrary()?);
    let mut models: Vec<Model> = vec![];
    for _ in 0..48 {
        if input.is_empty() {
            break;
        }
        let operation = input.int_in_range(0..=9)?;
        if models.is_empty() || operation == 0 && models.len() < MOST {
            models.push(Model { cache: pool.create(), start: 0, marks: vec![] });
            continue;
        }
        let n = input.choose_index(models.len())?;
        match operation {
            1 => {
                models.swap_remove(n);
            }
            2 | 3 => fork(&mut models, n, input)?,
            4 => {
                let before = input.int_in_range(0..=models[n].marks.len() + 2)?;
                let model = &mut models[n];
                model.cache.forget(before);
                let start = before.min(model.marks.len()) / TILE * TILE;
                model.start = model.start.max(start);
            }
            _ => {
                let count = input.int_in_range(0..=TILE + 40)?;
                let marks: Vec<f32> = (0..count).map(|_| numbers.next()).collect();
                append(&pool, &mut models[n], &marks);
            }
        }
        check(&pool, &models);
    }
    Ok(())
}

fn fork(models: &mut Vec<Model>, n: usize, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let Model { cache, start, marks } = &models[n];
    let end = input.int_in_range(0..=marks.len() + 1)?;
    match cache.fork(end) {
        Ok(cache) => {
            assert!((*start..=marks.len()).contains(&end));
            let model = Model { cache, start: *start, marks: marks[..end].to_vec() };
            if models.len() < MOST {
                models.push(model);
            }
        }
        Err(error) => {
            assert!(matches!(error, Error::OutOfRange { .. }), "{error}");
            assert!(!(*start..=marks.len()).contains(&end));
        }
    }
    Ok(())
}

/// Appends if there are pages, and changes nothing if not.
fn append(pool: &PagePool<f32>, model: &mut Model, marks: &[f32]) {
    let free = pool.free_pages();
    let held = model.marks.len() - model.start;
    let tiles = |tokens: usize| tokens.div_ceil(TILE);
    let more = tiles(held + marks.len()) - tiles(held);
    let (k, v) = (tensor(marks, DIMS.0), tensor(marks, DIMS.1));
    match model.cache.append(k.view(), v.view()) {
        Ok(()) => {
            // Its own last page, if another sequence held it, has been copied.
            assert!((more..=more + 1).contains(&(free - pool.free_pages())));
            model.marks.extend_from_slice(marks);
        }
        Err(Error::OutOfPages { needed, free: left }) => {
            assert_eq!((left, pool.free_pages()), (free, free));
            assert!(needed > free && (more..=more + 1).contains(&needed));
        }
        Err(error) => panic!("{error}"),
    }
}

/// Every sequence holds what it should, and pages are free that none holds.
fn check(pool: &PagePool<f32>, models: &[Model]) {
    let mut held = HashMap::new();
    for model in models {
        let store = &model.cache;
        assert_eq!((store.start(), store.end()), (model.start, model.marks.len()));
        store.pages().for_each(|page| *held.entry(page).or_insert(0usize) += 1);
        for (head, start) in (0..KV_HEADS)
            .flat_map(|head| (model.start..store.end()).step_by(TILE).map(move |at| (head, at)))
        {
            let positions = start..(start + TILE).min(store.end());
            let tile = store.tile(head, positions.clone());
            let (Some(KvRows::F32(keys)), Some(KvRows::F32(values))) =
                (tile.keys.rows(), tile.values.rows())
            else {
                panic!("stored as f32")
            };
            for (n, &mark) in model.marks[positions].iter().enumerate() {
                assert_eq!(keys.row(n), row(mark, head, DIMS.0));
                assert_eq!(values.row(n), row(mark, head, DIMS.1));
            }
        }
    }
    assert_eq!(held.len() + pool.free_pages(), pool.pages());
    for model in models {
        let store = &model.cache;
        for (tile, page) in store.pages().enumerate() {
            let shared = store.shared_tile(model.start + tile * TILE);
            assert_eq!(shared.map(|tile| tile.number), (held[&page] > 1).then_some(page));
        }
    }
}
