//! What all processes do together: sums whose bits do not depend on who holds the parts, and what is found to differ.

use foveal::testing::normal;
use foveal::{Cpu, Shape};
use foveal_processes::{
    Alone, Error, Processes, Threads, all_gather, first_failure, same_everywhere, sum_parts,
};

fn parts(len: usize) -> Vec<Vec<f32>> {
    let shape = Shape { batch: 1, seq: 1, heads: 1, dim: len };
    (0..6).map(|n| normal(shape, n).unwrap().into_vec()).collect()
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn a_sum_has_the_same_bits_for_any_number_of_processes() {
    let cpu = Cpu::detect().unwrap();
    for len in [1, 2, 5, 1000, 70_001] {
        let all = parts(len);
        let mut expected = all[0].clone();
        for part in &all[1..] {
            expected.iter_mut().zip(part).for_each(|(a, b)| *a += b);
        }
        for count in [1, 2, 3, 6] {
            let sums = Threads::run(count, |processes| {
                let size = 6 / count;
                let mut own = all[processes.rank() * size..][..size].to_vec();
                sum_parts(&processes, &mut own, cpu).unwrap();
                own.swap_remove(0)
            });
            assert!(sums.iter().all(|sum| bits(sum) == bits(&expected)), "{len} {count}");
        }
    }
    sum_parts(&Alone, &mut [], cpu).unwrap();
}

#[test]
fn bytes_of_all_arrive_in_order_at_all() {
    let all = Threads::run(4, |processes| {
        let own = vec![processes.rank() as u8; processes.rank() * 3];
        all_gather(&processes, &own).unwrap()
    });
    for gathered in all {
        for (rank, bytes) in gathered.iter().enumerate() {
            assert_eq!(bytes, &vec![rank as u8; rank * 3]);
        }
    }
    assert_eq!(all_gather(&Alone, b"one").unwrap(), [b"one"]);
}

#[test]
fn one_failure_and_one_difference_are_known_to_all() {
    let found = Threads::run(3, |processes| {
        let own = (processes.rank() == 1).then_some("no memory");
        first_failure(&processes, own).unwrap()
    });
    assert_eq!(found, vec![Some((1, "no memory".to_owned())); 3]);
    assert_eq!(Threads::run(2, |p| first_failure(&p, None).unwrap()), [None, None]);
    let found = Threads::run(3, |processes| {
        let text = if processes.rank() == 2 { "b" } else { "a\nb" };
        let own = [("level", "x".to_owned()), ("text", text.to_owned())];
        same_everywhere(&processes, &own).unwrap_err().to_string()
    });
    assert!(found[0].contains("process 2 has b for text, this one a b"), "{found:?}");
    assert!(found[2].contains("process 0 has a b for text, this one b"), "{found:?}");
    same_everywhere(&Alone, &[("level", "x".to_owned())]).unwrap();
}

#[test]
fn messages_of_wrong_lengths_and_processes_that_end_are_noticed() {
    let found = Threads::run(2, |processes| {
        let len = 1 + processes.rank();
        processes.shift(1, &vec![0.0; len], &mut vec![0.0; len])
    });
    assert!(matches!(found[0], Err(Error::MessageLength { rank: 1, expected: 1, got: 2 })));
    let found = Threads::run(2, |processes| match processes.rank() {
        0 => Ok(()),
        _ => processes.shift_bytes(1, &[1], &mut [0]),
    });
    assert!(matches!(found[1], Err(Error::Gone { rank: 0 })));
    assert!(
        Alone.shift(1, &[1.0], &mut []).is_err() && Alone.shift_bytes(1, &[], &mut [1]).is_err()
    );
}
