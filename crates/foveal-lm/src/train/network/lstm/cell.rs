//! One token of every sequence through the gates, and back.

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

/// Gates become their functions; the new cells and what is given.
///
/// `gates` `[sequences, 4, width]`, `before` the cells before, empty for zeros.
pub(super) fn forward(
    gates: &mut [f32],
    before: &[f32],
    (cells, out): (&mut [f32], &mut [f32]),
    width: usize,
) {
    let rows = gates.chunks_exact_mut(4 * width);
    let places = cells.chunks_exact_mut(width).zip(out.chunks_exact_mut(width));
    for (n, (gates, (cells, out))) in rows.zip(places).enumerate() {
        for d in 0..width {
            let at = |gate: usize| gate * width + d;
            let (i, f) = (sigmoid(gates[at(0)]), sigmoid(gates[at(1)] + 1.0));
            let (g, o) = (gates[at(2)].tanh(), sigmoid(gates[at(3)]));
            let old = before.get(n * width + d).copied().unwrap_or(0.0);
            cells[d] = f * old + i * g;
            out[d] = o * cells[d].tanh();
            [gates[at(0)], gates[at(1)], gates[at(2)], gates[at(3)]] = [i, f, g, o];
        }
    }
}

/// Gates become the gradients of what they were made from; `d_cells` goes from this token's cells to those before.
pub(super) fn backward(
    gates: &mut [f32],
    (before, cells): (&[f32], &[f32]),
    (d_out, d_cells): (&[f32], &mut [f32]),
    width: usize,
) {
    for (n, gates) in gates.chunks_exact_mut(4 * width).enumerate() {
        for d in 0..width {
            let (at, place) = (|gate: usize| gate * width + d, n * width + d);
            let [i, f, g, o] = [0, 1, 2, 3].map(|gate| gates[at(gate)]);
            let old = before.get(place).copied().unwrap_or(0.0);
            let (cell, d_out) = (cells[place].tanh(), d_out[place]);
            let d_cell = d_cells[place] + d_out * o * (1.0 - cell * cell);
            gates[at(0)] = d_cell * g * i * (1.0 - i);
            gates[at(1)] = d_cell * old * f * (1.0 - f);
            gates[at(2)] = d_cell * i * (1.0 - g * g);
            gates[at(3)] = d_out * cell * o * (1.0 - o);
            d_cells[place] = d_cell * f;
        }
    }
}
