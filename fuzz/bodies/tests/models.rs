//! The seeds of the model target are whole models.

use foveal_lm::weights::Weights;
use std::path::Path;

#[test]
fn every_seed_is_a_model_that_loads() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus-seeds/model");
    for entry in std::fs::read_dir(seeds).expect("a folder of seeds") {
        let path = entry.expect("a readable folder").path();
        let loaded =
            Weights::open(&path).map_err(Into::into).and_then(|w| foveal_lm::Model::new(&w));
        assert!(loaded.is_ok(), "{}: {}", path.display(), loaded.unwrap_err());
    }
}
