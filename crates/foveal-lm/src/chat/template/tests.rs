//! Templates against what Jinja2 makes of them, and templates that mean harm.

use std::time::{Duration, UNIX_EPOCH};

use serde_json::Value;

use super::*;
use crate::chat::Role;
use crate::testing::fetch_vocabularies;

/// Written by `tests/golden/chat_templates.py`.
const GOLDEN: &str = include_str!("../../../tests/golden/chat_templates.json");

/// 2026-11-24 17:05:09 UTC, as in the script.
fn clock() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_795_539_909)
}

fn template(source: &str) -> Result<ChatTemplate, Error> {
    let marks = vec![("bos_token", "<BOS>".to_owned()), ("eos_token", "<EOS>".to_owned())];
    ChatTemplate::assemble(source, marks, clock)
}

fn message(role: Role, content: &str) -> Message {
    Message { role, content: content.to_owned() }
}

fn messages(conversation: &Value) -> Vec<Message> {
    let messages = conversation.as_array().unwrap().iter().map(|each| {
        let role = match each["role"].as_str().unwrap() {
            "system" => Role::System,
            "user" => Role::User,
            _ => Role::Assistant,
        };
        message(role, each["content"].as_str().unwrap())
    });
    messages.collect()
}

#[test]
fn real_templates_give_what_jinja2_makes_of_them() {
    let Some(folder) = fetch_vocabularies() else { return };
    let golden: Value = serde_json::from_str(GOLDEN).unwrap();
    let renderings = golden["renderings"].as_object().unwrap();
    assert!(renderings.len() > 60);
    let mut wrong = Vec::new();
    for (name, expected) in renderings {
        let source = folder.join("templates").join(format!("{name}.jinja"));
        let source = std::fs::read_to_string(source).unwrap();
        let template = match template(&source) {
            Ok(template) => template,
            Err(error) => {
                wrong.push(format!("{name}: {error}"));
                continue;
            }
        };
        for (n, conversation) in golden["conversations"].as_array().unwrap().iter().enumerate() {
            let found = template.render(&messages(conversation), true);
            if found.as_deref().ok() != expected[n].as_str() {
                wrong.push(format!("{name} {n}: {found:?}, expected {:?}", expected[n].as_str()));
            }
        }
    }
    assert!(wrong.is_empty(), "{} wrong:\n{}", wrong.len(), wrong.join("\n"));
}

const CHATML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' \
    + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}\
    {{ '<|im_start|>assistant\n' }}{% endif %}";

#[test]
fn chatml() {
    let messages = [message(Role::System, "Be brief."), message(Role::User, "Hi")];
    let template = template(CHATML).unwrap();
    let text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n";
    assert_eq!(template.render(&messages, false).unwrap(), text);
    let prompt = format!("{text}<|im_start|>assistant\n");
    assert_eq!(template.render(&messages, true).unwrap(), prompt);
}

#[test]
fn the_plain_template_names_who_speaks() {
    let messages = [
        message(Role::System, "Be brief.\n"),
        message(Role::User, " Hi"),
        message(Role::Assistant, " Hello!"),
        message(Role::User, "Bye"),
    ];
    let text = "Be brief.\n\nUser: Hi\nAssistant: Hello!\nUser: Bye\n";
    let plain = ChatTemplate::plain().unwrap();
    assert_eq!(plain.render(&messages, false).unwrap(), text);
    assert_eq!(plain.render(&messages, true).unwrap(), format!("{text}Assistant:"));
}

#[test]
fn a_template_refuses_in_its_own_words() {
    let source =
        "{% if messages[0].role != 'user' %}{{ raise_exception('users begin') }}{% endif %}";
    let error = template(source).unwrap().render(&[message(Role::System, "x")], true).unwrap_err();
    assert_eq!(error.to_string(), "the model's chat template: users begin (line 1)");
}

#[test]
fn what_is_no_template_is_refused() {
    for source in ["{% for %}", "{{ ", "{% if x %}", "{% fly %}{% endfly %}", "{{ 1 + }}"] {
        let error = template(source).unwrap_err();
        assert!(matches!(error, Error::Template { .. }), "{source}: {error}");
    }
    let long = " ".repeat(MAX_BYTES + 1);
    assert!(template(&long).unwrap_err().to_string().contains("bytes"));
}

/// Loops without end, towers of calls, text that doubles, lists in lists, deep syntax: each ends with an error that says
/// so, and takes neither all memory nor all stack.
#[test]
fn templates_that_mean_harm_end_with_an_error() {
    let loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    let doubling = "{% set n = namespace(x='xxxxxxxx') %}\
        {% for i in range(99999) %}{% set n.x = n.x ~ n.x %}{% endfor %}";
    let nested = "{% set n = namespace(x=[]) %}{% for a in range(99999) %}{% for i in range(99999) %}\
        {% set n.x = [n.x] %}{% endfor %}{% endfor %}";
    let printed = "{% set n = namespace(x=[]) %}{% for i in range(50000) %}\
        {% set n.x = [n.x] %}{% endfor %}{{ n.x | tojson }}";
    let calls = "{% macro f(x) %}{{ f(x + 1) }}{% endmacro %}{{ f(0) }}";
    let repeated = "{{ 'x' * 10000000000 }}";
    let wide = "{{ '%9999999999d' | format(1) }}";
    for source in [loops, doubling, nested, printed, calls, repeated, wide] {
        let error = template(source).unwrap().render(&[], true).unwrap_err();
        assert!(matches!(error, Error::Template { .. }), "{source}: {error}");
    }
    for source in [
        format!("{{{{ {}1{} }}}}", "(".repeat(20_000), ")".repeat(20_000)),
        "{% if a %}".repeat(20_000),
        format!("{{{{ {}1 }}}}", "not ".repeat(20_000)),
    ] {
        // The parser may well have read it; whatever it made of it is dropped here, level by level.
        match template(&source) {
            Ok(template) => drop(template.render(&[], true)),
            Err(error) => assert!(matches!(error, Error::Template { .. }), "{error}"),
        }
    }
}

#[test]
fn templates_see_no_files_and_no_variables() {
    for source in ["{% include '/etc/passwd' %}", "{% extends 'x' %}", "{{ env.HOME }}"] {
        let done = template(source).and_then(|template| template.render(&[], true));
        assert!(done.as_ref().is_err() || done.as_deref().ok() == Some(""), "{source}: {done:?}");
    }
}

#[test]
fn generation_tags_change_no_text() {
    let tagged = "a{% generation %}b {%- endgeneration -%} c{{ '{%' }}";
    assert_eq!(without_generation_tags(tagged), "a{% if true %}b {%- endif -%} c{{ '{%' }}");
    assert_eq!(without_generation_tags("{% generation"), "{% if true");
}
