//! What named mixers hold of a text, on disk: resumed to the bit, and refused where it is not what a section holds.

use foveal::Phase;
use foveal::projection::Format;
use foveal_lm::mixer::{CacheOptions, CacheStorage};
use foveal_lm::prompt_cache::PromptCache;
use foveal_lm::weights::Weights;
use foveal_lm::{Error, Model};
use serde_json::{Value, json};

use crate::formats::Folder;
use crate::latent::logits;
use crate::laws::assert_same;
use crate::prompt_cache::forged;
use crate::sections::{TOKENS, mixers, name, text, tiny};

/// A model of such layers, in a folder where a cache may lie too.
fn saved_model(mixer: &Value, test: &str) -> (Folder, Model, Weights) {
    let folder = Folder::new(&format!("{}-{test}", name(mixer)));
    tiny(mixer).save_folder(&folder.0, Format::F32, 1).unwrap();
    let weights = Weights::open(&folder.0).unwrap();
    let model = Model::new(&weights).unwrap();
    (folder, model, weights)
}

#[test]
fn a_text_goes_on_to_the_bit() {
    let native = json!({"name": "native_sparse", "length": 4, "stride": 2, "block": 4, "top": 4, "window": 7});
    let performer = json!({"name": "performer", "features": 16});
    for mixer in mixers().into_iter().chain([native, performer]) {
        let (folder, model, weights) = saved_model(&mixer, "saved");
        let (path, text) = (folder.0.join("cache"), text());
        let f16 = CacheOptions { storage: CacheStorage::F16, ..CacheOptions::default() };
        for (options, cut) in [0, 1, 2, 7, 24, 39]
            .map(|cut| (CacheOptions::default(), cut))
            .into_iter()
            .chain([(f16, 25)])
        {
            let cache = PromptCache::new(&model, &weights, options).unwrap();
            let mut state = model.state_with(&options).unwrap();
            logits(&model, &mut state, Phase::Prompt, (&text[..cut], &[]));
            cache.save(&path, &text[..cut], &state).unwrap();
            let (tokens, mut found) = cache.open(&path).unwrap().unwrap();
            assert_eq!((&tokens[..], found.position()), (&text[..cut], cut));
            assert_eq!(found.kv_bytes(), state.kv_bytes(), "{mixer}");
            let next = (&text[cut..], &[][..]);
            let expected = logits(&model, &mut state, Phase::Prompt, next);
            assert_same(&logits(&model, &mut found, Phase::Prompt, next), &expected);
            // Generated tokens go on as well, and what was read of a file can be written again.
            let (_, mut found) = cache.open(&path).unwrap().unwrap();
            cache.save(&path, &text[..cut], &found).unwrap();
            let (_, mut again) = cache.open(&path).unwrap().unwrap();
            let expected = logits(&model, &mut found, Phase::Generated, next);
            assert_same(&logits(&model, &mut again, Phase::Generated, next), &expected);
        }
    }
}

#[test]
fn forged_sections_are_refused() {
    for mixer in mixers() {
        let (folder, model, weights) = saved_model(&mixer, "forged");
        let (path, text) = (folder.0.join("cache"), text());
        let cache = PromptCache::new(&model, &weights, CacheOptions::default()).unwrap();
        let mut state = model.state().unwrap();
        logits(&model, &mut state, Phase::Prompt, (&text, &[]));
        cache.save(&path, &text, &state).unwrap();
        let whole = std::fs::read(&path).unwrap();
        let file = safetensors::SafeTensors::deserialize(&whole).unwrap();
        let arrays: Vec<String> = file
            .tensors()
            .into_iter()
            .filter(|(name, view)| name.contains("section") && !view.data().is_empty())
            .map(|(name, _)| name)
            .collect();
        assert!(!arrays.is_empty());
        for array in &arrays {
            for change in ["gone", "shorter"] {
                let bytes = forged(&whole, |name, dtype, shape, data| match change {
                    _ if name != array => {}
                    "gone" => shape.clear(),
                    _ => {
                        *shape = vec![shape.iter().product::<usize>() - 1];
                        data.truncate(data.len() - dtype.bitsize() / 8);
                    }
                });
                std::fs::write(&path, bytes).unwrap();
                let error = cache.open(&path).map(|found| found.is_some()).unwrap_err();
                assert!(matches!(error, Error::PromptCache { .. }), "{mixer} {array}: {error}");
            }
        }
        let fewer = forged(&whole, |name, _, shape, data| {
            if name == "tokens" {
                shape[0] = TOKENS - 1;
                data.truncate(4 * shape[0]);
            }
        });
        std::fs::write(&path, fewer).unwrap();
        let found = cache.open(&path).map(|found| found.is_some());
        // A state of constant size does not tell of how many tokens it is; the checksum says that it is whole. Nor does a memory
        // tell of the open segment's.
        let untold = [
            "linear",
            "efficient",
            "retention",
            "scalar_decay",
            "gla",
            "delta",
            "gated_delta",
            "infini",
            "memorizing",
        ];
        let all = mixer.is_object() && untold.iter().any(|name| mixer["name"] == *name);
        let mixed = mixer.to_string().contains("memorizing") && !all;
        assert!(mixed || found.is_ok() == all, "{mixer}: {found:?}");
    }
}
