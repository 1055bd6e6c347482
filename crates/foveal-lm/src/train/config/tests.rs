use super::*;

fn parse(text: &str, settings: &[&str]) -> Result<Config, Error> {
    let settings: Vec<String> = settings.iter().map(|&s| s.to_owned()).collect();
    Config::parse(text, &settings, Path::new("/texts"))
}

#[test]
fn settings_come_after_the_file() {
    let text = "[model]\nlayers = 2\nmixer = [{ name = \"full\" }, { name = \"window\", tokens = 8 }]\n\
                [data]\ntrain = [\"a.txt\"]\n";
    let settings = [
        "model.layers=3",
        "data.tokenizer=bytes",
        "schedule.kind=wsd",
        "optimizer.betas=[0.8, 0.9]",
        "train.prompt=Once upon = a time",
        "model.mixer={name = \"moba\", block = 8, top = 2}",
    ];
    let config = parse(text, &settings).unwrap();
    assert_eq!(config.model.layers, 3);
    assert_eq!(config.schedule.kind, Kind::Wsd);
    assert_eq!(config.optimizer.betas, [0.8, 0.9]);
    assert_eq!(config.train.prompt, "Once upon = a time");
    assert_eq!(config.data.train, [Path::new("/texts/a.txt")]);
    assert_eq!(config.data.tokenizer.as_deref(), Some("bytes"));
    let json = config.model.to_json(300, 64).unwrap();
    assert_eq!(json["foveal"]["mixer"], serde_json::json!({"name": "moba", "block": 8, "top": 2}));
    assert_eq!(json["max_position_embeddings"], 64);
    let again = Config::parse(&config.to_text().unwrap(), &[], Path::new("/elsewhere")).unwrap();
    assert_eq!(again, config);
}

#[test]
fn a_config_json_is_one_that_can_be_read() {
    let mixer = "model.mixer=[{name = \"full\"}, [{name = \"window\", tokens = 4, heads = 2}, {name = \"linear\", heads = 2}]]";
    let config = parse("", &["model.layers=2", mixer]).unwrap();
    let json = config.model.to_json(300, 64).unwrap();
    let model = crate::config::ModelConfig::from_json(&json).unwrap();
    assert_eq!((model.vocab, model.layers.len(), model.context), (300, 2, 64));
    assert_eq!(model.layers[1].sections.len(), 2);
    assert!(model.tied_head);
}

#[test]
fn errors_name_the_key() {
    for (text, setting, words) in [
        ("[model]\nlayer = 3\n", None, "layer"),
        ("[model]\nlayers = \"three\"\n", None, "layers"),
        ("[modle]\n", None, "modle"),
        ("[model\n", None, "line 1"),
        ("", Some("optimizer.learning_rat=1"), "learning_rat"),
        ("", Some("schedule.kind=linear"), "kind"),
        ("", Some("optimizer.learning_rate=-1"), "optimizer.learning_rate is -1"),
        ("", Some("optimizer.learning_rate=nan"), "optimizer.learning_rate is NaN"),
        ("", Some("optimizer.betas=[0.9, 1.0]"), "optimizer.betas is 1"),
        ("", Some("data.sequence=0"), "data.sequence is 0"),
        ("", Some("data.vocab=100"), "data.vocab is 100"),
        ("", Some("train.dropout=1.0"), "train.dropout is 1"),
        ("", Some("model.heads=3"), "model.width is 128"),
        ("", Some("model"), "section.key=value"),
        ("", Some("layers=3"), "section.key=value"),
        ("model = 3\n", Some("model.layers=3"), "section.key=value"),
    ] {
        let settings: Vec<&str> = setting.into_iter().collect();
        let message = parse(text, &settings).unwrap_err().to_string();
        assert!(
            message.contains(words) && !message.contains('\n'),
            "{text:?} {setting:?}: {message}"
        );
    }
}

#[test]
fn the_examples_are_models() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/train-hybrid.toml");
    let config = parse(&std::fs::read_to_string(path).unwrap(), &[]).unwrap();
    let json = config.model.to_json(config.data.vocab, config.data.sequence).unwrap();
    let model = crate::config::ModelConfig::from_json(&json).unwrap();
    assert_eq!((model.layers.len(), model.layers[4].sections.len()), (6, 2));
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/train-translation.toml");
    let config = parse(&std::fs::read_to_string(path).unwrap(), &[]).unwrap();
    let again = Config::parse(&config.to_text().unwrap(), &[], Path::new("/elsewhere")).unwrap();
    assert_eq!(again, config);
    let json = config.model.to_json(257, config.data.sequence).unwrap();
    let error = crate::config::ModelConfig::from_json(&json).unwrap_err();
    assert!(matches!(error, crate::Error::EncoderDecoder), "{error}");
}
