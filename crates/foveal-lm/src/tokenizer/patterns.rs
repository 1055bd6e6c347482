//! The pre-tokenizers by name: which patterns each model family cuts its text with.
//!
//! Two names of one family cut alike. Not here, because no automaton or published vector covers them: `jais-2`,
//! `chameleon`, `kimi-k2`, `tiny_aya`, `whitespace`.

use super::pretokenizer::Cut::{self, DigitsByThree, Only, Words};

/// Names that cut text alike.
#[derive(Debug)]
pub(super) struct Family {
    pub(super) names: &'static [&'static str],
    pub(super) cuts: &'static [Cut],
    pub(super) whole_words: bool,
    pub(super) add_bos: bool,
}

const fn family(names: &'static [&'static str], cuts: &'static [Cut]) -> Family {
    Family { names, cuts, whole_words: false, add_bos: false }
}

const fn whole_words(family: Family) -> Family {
    Family { whole_words: true, ..family }
}

const fn add_bos(family: Family) -> Family {
    Family { add_bos: true, ..family }
}

/// A digit run of GPT-2's family is one word.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+";

/// At most three digits are one word.
const LLAMA3: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
);

/// Every digit is a word.
const QWEN2: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
);

/// Marks belong to their letters.
const QWEN35: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
);

/// A capital begins a word.
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}--a-z]*[\p{L}--A-Z]+|[^\r\n\p{L}\p{N}]?[\p{L}--a-z]+[\p{L}--A-Z]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
);

/// A capital begins a word, and a contraction ends it.
const GPT4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{L}--a-z]*[\p{L}--A-Z]+(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?",
    r"|[^\r\n\p{L}\p{N}]?[\p{L}--a-z]+[\p{L}--A-Z]*(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+"
);

const DEEPSEEK3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+"
);

const BAILINGMOE: &str = concat!(
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]"
);

const SEED_CODER: &str = concat!(
    r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]",
    r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+"
);

/// The cased letters of DeepSeek's `tokenizer.json`, of an older Unicode than `\p{LC}`.
const DEEPSEEK_LETTERS: &str = concat!(
    r"\s?[",
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ",
    "ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏",
    "𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃",
    r"]+"
);

const CJK: &str = r"[一-龥\u{3040}-\u{309f}\u{30a0}-\u{30ff}]+";
const CJK_AND_HANGUL: &str = r"[一-龥\u{800}-一가-\u{d7ff}]+";

const BLOOM: &str = r" ?[^(\s|.,!?…。，、।۔،)]+";

pub(super) const FAMILIES: &[Family] = &[
    family(
        &["default"],
        &[Only(r"[\p{P}$+<=>^~|]+"), Words(GPT2), Only(r"\p{N}+"), Only("[0-9][0-9][0-9]")],
    ),
    family(
        &["gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
            "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "exaone4", "mpt", "olmo", "jais", "trillion",
            "granite-docling"],
        &[Words(GPT2)],
    ),
    family(
        &["starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b", "mellum2"],
        &[Only(r"\p{N}"), Words(GPT2)],
    ),
    add_bos(whole_words(family(
        &["llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"],
        &[Words(LLAMA3)],
    ))),
    family(&["dbrx", "smaug-bpe", "chatglm-bpe"], &[Words(LLAMA3)]),
    whole_words(family(&["glm4", "glm5"], &[Words(LLAMA3)])),
    family(
        &["qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"],
        &[Words(QWEN2)],
    ),
    family(&["qwen35"], &[Words(QWEN35)]),
    family(&["laguna"], &[Only("[^\n]+|[\n]+"), Words(QWEN2)]),
    add_bos(whole_words(family(&["tekken"], &[Words(TEKKEN)]))),
    family(&["gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"], &[Words(GPT4O)]),
    family(
        &["deepseek-llm"],
        &[
            Only("[\r\n]"),
            Only(DEEPSEEK_LETTERS),
            Only(r"\s?[!-/:-~！-／：-～‘-‟\u{3000}-。]+"),
            Only(r"\s+$"),
            Only(CJK_AND_HANGUL),
            Only(r"\p{N}+"),
        ],
    ),
    family(
        &["deepseek-coder"],
        &[Only("[\r\n]"), Only(r"\s?\p{L}+"), Only(r"\s?\p{P}+"), Only(CJK_AND_HANGUL), Only(r"\p{N}")],
    ),
    family(
        &["deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"],
        &[Only(r"\p{N}{1,3}"), Only(CJK), Words(DEEPSEEK3)],
    ),
    family(&["falcon"], &[Only(r"[\p{P}$+<=>^~|`]+"), Words(GPT2), Only("[0-9][0-9][0-9]")]),
    family(&["poro-chat", "bloom", "gpt3-finnish"], &[Only(BLOOM)]),
    family(&["viking"], &[Only(BLOOM), Only(r"\p{N}")]),
    family(&["superbpe"], &[Only(r"\p{N}+"), DigitsByThree]),
    family(&["bailingmoe", "bailingmoe2", "llada-moe"], &[Words(BAILINGMOE)]),
    family(&["seed-coder"], &[Words(SEED_CODER)]),
];
