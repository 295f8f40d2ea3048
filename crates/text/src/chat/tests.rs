//! Templates of all kinds, the hostile ones above all.

use serde_json::json;

use super::*;

fn render(source: &str) -> Result<String, TextError> {
    render_with(source, &ChatInput::default())
}

fn render_with(source: &str, input: &ChatInput) -> Result<String, TextError> {
    ChatTemplate::new(source, Some("<s>"), Some("</s>"))?.render(input)
}

fn check(source: &str, expected: &str) {
    assert_eq!(render(source).as_deref(), Ok(expected), "{source}");
}

fn conversation() -> ChatInput {
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " What's 2 < 3? \"&\" é 🎉\n"},
    ]);
    ChatInput { messages, add_generation_prompt: true, ..ChatInput::default() }
}

#[test]
fn blocks_take_the_newline_and_the_indentation_with_them() {
    check("{% if true %}\n  {% set x = 1 %}\n  a{{ x }}\n{% endif %}\nb\n", "  a1\nb");
    check("a  {%- if true -%}  b  {%- endif %}  c", "ab  c");
}

#[test]
fn values_are_written_as_python_writes_them() {
    check("{{ true }} {{ none }} {{ 1.0 }} {{ 1e20 }} {{ 1e-7 }}", "True None 1.0 1e+20 1e-07");
    check("{{ ['a', 1, none, \"it's\"] }}", "['a', 1, None, \"it's\"]");
    check("{{ {'a': [true], 'b': 'x\\ny'} }}", "{'a': [True], 'b': 'x\\ny'}");
    check("{{ 'n: ' ~ 1.5 ~ none ~ [1] }}", "n: 1.5None[1]");
    check("{{ missing }}|{{ missing ~ 'x' }}", "|x");
}

#[test]
fn tojson_is_json_dumps_without_html_escapes() {
    let input = ChatInput {
        tools: Some(json!([{"name": "f", "d": "<a> & 'b' é \u{1}", "n": 1.0, "e": {}, "l": []}])),
        ..ChatInput::default()
    };
    assert_eq!(
        render_with("{{ tools | tojson }}", &input).as_deref(),
        Ok(r#"[{"name": "f", "d": "<a> & 'b' é \u0001", "n": 1.0, "e": {}, "l": []}]"#)
    );
    assert_eq!(
        render_with("{{ tools[0] | tojson(indent=2) }}", &input).as_deref(),
        Ok("{\n  \"name\": \"f\",\n  \"d\": \"<a> & 'b' é \\u0001\",\n  \"n\": 1.0,\n  \
            \"e\": {},\n  \"l\": []\n}")
    );
    check(
        "{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true, ensure_ascii=true) }}",
        "{\"a\": \"\\u00e9\", \"b\": 1}",
    );
    check("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]");
}

#[test]
fn python_methods_work() {
    check("{{ '  a b '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'a\\n'.rstrip('\\n') }}", "a b|a|a");
    check("{{ 'a,b,c'.split(',')[-1] }}{{ 'a b'.split() }}", "c['a', 'b']");
    check("{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith(('x', 'c')) }}", "TrueTrue");
    check("{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}{{ v }}{% endfor %}", "a1b2");
    check("{{ {'a': 1}.get('b', 3) }}{{ {'a': 1}.keys() | list }}", "3['a']");
    check("{{ ', '.join(['a', 'b']) }}{{ 'aXa'.replace('a', 'bb') }}", "a, bbbXbb");
    check("{{ '{} is {}'.format('a', 1) }}{{ 'abc'[::-1] }}{{ 'abc'[1:] }}", "a is 1cbabc");
    check("{{ 'Ab'.upper() }}{{ 'Ab'.lower() }}{{ 'ab c'.title() }}", "ABabAb C");
}

#[test]
fn filters_that_templates_use_work() {
    check("{{ [3, 1, 2] | sort | join('-') }}{{ ['b', 'a'] | first }}", "1-2-3b");
    check(
        "{{ [{'r': 'u', 'c': 1}, {'r': 'a', 'c': 2}] | selectattr('r', 'equalto', 'a') \
           | map(attribute='c') | list }}",
        "[2]",
    );
    check("{{ 'a b' | replace(' ', '_') }}{{ ' x ' | trim }}{{ 'ab' | length }}", "a_bx2");
    check("{{ 'a\\nb' | indent(2) }}|{{ 'a\\nb' | indent(2, true) }}", "a\n  b|  a\n  b");
    check("{{ none | default('d', true) }}{{ {'a': 1} | items | list }}", "d[['a', 1]]");
    check("{{ [1, 2, 3] | reject('equalto', 2) | list }}{{ 3 | string }}", "[1, 3]3");
    check("{{ '%s-%d' | format('a', 3) }}{{ 'a b' | split(' ') }}", "a-3['a', 'b']");
}

#[test]
fn namespaces_loop_controls_and_macros_work() {
    check(
        "{% set ns = namespace(n=0, s='') %}{% for i in range(10) %}{% if i == 2 %}{% continue %}\
         {% endif %}{% if i == 5 %}{% break %}{% endif %}{% set ns.n = ns.n + i %}\
         {% set ns.s = ns.s ~ i %}{% endfor %}{{ ns.n }} {{ ns.s }}",
        "8 0134",
    );
    check(
        "{% macro m(a, b='x') %}[{{ a }}{{ b }}]{% endmacro %}{{ m(1) }}{{ m(2, b=3) }}",
        "[1x][23]",
    );
    check("{% macro w() %}<{{ caller() }}>{% endmacro %}{% call w() %}in{% endcall %}", "<in>");
    check(
        "{% for x in [1, [2, [3]]] recursive %}{% if x is sequence %}({{ loop(x) }})\
           {% else %}{{ x }}{% endif %}{% endfor %}",
        "1(2(3))",
    );
    check("{% set text %}a{{ 1 }}{% endset %}{{ text }}{% filter upper %}b{% endfilter %}", "a1B");
    check(
        "{% for m in [1, 2] %}{{ loop.index0 }}{{ loop.last }}{% else %}none{% endfor %}",
        "0False1True",
    );
    check(
        "{{ 'a' if false }}{{ 'b' if true else 'c' }}{{ 1 in [1] and 'x' not in 'abc' }}",
        "bTrue",
    );
    check(
        "{% generation %}a{% endgeneration %}{%- generation -%} b {%- endgeneration -%} c",
        "abc",
    );
}

#[test]
fn the_context_is_what_apply_chat_template_gives() {
    let source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}\
                  {% endfor %}{% if add_generation_prompt %}>{% endif %}{{ tools is none }}\
                  {{ tools is defined }}{{ strftime_now is defined }}{{ mode }}";
    let mut input = conversation();
    input.extra.insert("mode".into(), json!("fast"));
    assert_eq!(
        render_with(source, &input).as_deref(),
        Ok("<s>[system]Be brief.[user]What's 2 < 3? \"&\" é 🎉>TrueTrueFalsefast")
    );
    input.now = Some(LocalTime { year: 2025, month: 1, day: 2, hour: 3, minute: 4, second: 5 });
    assert_eq!(render_with("{{ strftime_now('%d %b %Y') }}", &input).as_deref(), Ok("02 Jan 2025"));
}

#[test]
fn a_template_can_refuse_a_conversation() {
    let source = "{% macro m() %}{{ raise_exception('roles must alternate') }}{% endmacro %}\
                  {{ m() }}";
    assert_eq!(render(source), Err(TextError::Refused("roles must alternate".into())));
}

#[test]
fn the_default_template_is_found_in_a_configuration() {
    let one = json!({"chat_template": "a"});
    let list =
        [json!({"name": "rag", "template": "r"}), json!({"name": "default", "template": "d"})];
    let many = json!({"chat_template": list});
    assert_eq!(ChatTemplate::source_in(&one), Some("a"));
    assert_eq!(ChatTemplate::source_in(&many), Some("d"));
    assert_eq!(ChatTemplate::source_in(&json!({})), None);
}

#[test]
fn broken_templates_are_errors() {
    for source in [
        "{% if %}",
        "{{ a b }}",
        "{% endfor %}",
        "{{ 'a",
        "{% for x in %}",
        "{% include 'x' %}",
        "{% extends 'x' %}",
        "{{ f(*x) }}",
        "{% unknown %}",
    ] {
        assert!(matches!(render(source), Err(TextError::Template(_))), "{source}");
    }
    for source in [
        "{{ nope() }}",
        "{{ 1 | nope }}",
        "{{ a.b.c }}",
        "{{ 1 / 0 }}",
        "{{ 'a'.nope() }}",
        "{{ 'a' + 1 }}",
        "{{ [] | batch(2) }}",
        "{{ x is nope }}",
        "{{ [1] | tojson(indent='x') }}",
    ] {
        assert!(
            matches!(render(source), Err(TextError::Render(_))),
            "{source}: {:?}",
            render(source)
        );
    }
}

#[test]
fn a_panic_of_the_engine_is_an_error() {
    let rendered = render("{{ [][::-1] }}");
    assert!(
        matches!(&rendered, Err(TextError::Render(why)) if why.contains("does not handle")),
        "{rendered:?}"
    );
    // No template is known on which compiling panics; this stands in for it.
    let compiled: Result<(), _> = compiling(|| panic!("an assertion of the engine"));
    assert!(
        matches!(&compiled, Err(TextError::Template(why)) if why.contains("does not handle")),
        "{compiled:?}"
    );
}

/// The template must come to a limit while it runs.
fn check_exhausted(source: &str) {
    let result = render(source).map(|text| text.len());
    assert!(matches!(result, Err(TextError::Exhausted(_))), "{source}: {result:?}");
}

/// The template must end in an error of one of the kinds for its own faults.
fn check_stopped(source: &str) {
    let label: String = source.chars().take(160).collect();
    let result = render(source);
    let stopped = matches!(
        result,
        Err(TextError::Exhausted(_) | TextError::Template(_) | TextError::Render(_))
    );
    let shown = result.map(|text| text.len());
    assert!(stopped, "{label}: {shown:?}");
}

#[test]
fn templates_that_take_time_are_stopped() {
    let sources = [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}",
        "{% block b %}{{ self.b() }}{% endblock %}",
        "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}",
        "{% set l = range(90000) | list %}{{ l | select('in', l) | list | length }}",
    ];
    sources.into_iter().for_each(check_stopped);
    // Each of these takes a while; done 100,000 times it takes too long.
    let slow = [
        "{% if s == s ~ '' %}{% endif %}",
        "{{ s | length }}",
        "{{ 'ba!' in s }}",
        "{{ s[-1] }}",
        "{{ s[-2:] }}",
        "{{ s.count('b') }}",
        "{{ s is in(s ~ s) }}",
        "{{ l == l[0:] }}",
        "{{ (l | sort)[0] }}",
        "{{ ('a' * k).split('b') | length }}",
    ];
    for body in slow {
        check_exhausted(&format!(
            "{{% set k = 2000000 %}}{{% set s = 'ab' * k %}}{{% set l = range(90000) | list %}}\
             {{% for i in range(100000) %}}{body}{{% endfor %}}"
        ));
    }
}

#[test]
fn templates_that_take_memory_are_stopped() {
    let sources = [
        "{{ 'a' * 1000000000 }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ ['a'] * 1000000000 }}",
        "{{ (1, 2) * 90000000 }}",
        "{% set n = 90000000 %}{{ (1, 2) * n }}{{ [0] * n }}",
        "{% set n = 100000000 %}{{ 'a' * n }}",
        "{{ range(1000000000) }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ [1] | tojson(indent=1000000000) }}",
        "{{ 'a\\nb' | indent(1000000000) }}",
        "{% set k = 8000000 %}{{ ('a' * k) | list | length }}",
        "{% set k = 8000000 %}{{ ('a' * k).split('a') | length }}",
        "{% set k = 8000000 %}{{ ('a\\n' * k // 2).splitlines() | length }}",
        "{% set k = 8000000 %}{% for c in 'a' * k %}{% endfor %}",
        "{% set k = 8000000 %}{% set s = 'a' * k %}{{ [s] * 100 }}",
        "{% set k = 4000000 %}{% set s = 'a' * k %}{{ [s, s, s, s, s, s] | upper }}",
        "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set n = namespace(s='ab') %}\
         {% for i in range(60) %}{% set n.s = d(n.s) %}{% endfor %}",
    ];
    sources.into_iter().for_each(check_stopped);
    // What doubles or more, sixty times.
    let growing = [
        ("'ab'", "{% set n.v = n.v ~ n.v %}"),
        ("'ab'", "{% set n.v = n.v + n.v %}"),
        ("'ab'", "{% set n.v = n.v * 9 %}"),
        ("'ab'", "{% set n.v = n.v.replace('b', 'bbbbbbbbb') %}"),
        ("'ab'", "{% set n.v = n.v | replace('', 'b') %}"),
        ("'ab'", "{% set v %}{{ n.v }}{{ n.v }}{% endset %}{% set n.v = v %}"),
        ("'ab'", "{% set n.v = ((n.v ~ ',') * 9).split(',') | join(n.v) %}"),
        ("[1]", "{% set n.v = n.v + n.v %}"),
        ("[1]", "{% set n.v = [n.v, n.v] %}"),
        ("[1]", "{% set n.v = {'a': n.v, 'b': n.v} %}"),
        ("[1]", "{% set n.v = (n.v, n.v) %}"),
        ("[1]", "{% set n.v = dict(a=n.v, b=n.v) %}"),
    ];
    for (start, step) in growing {
        check_exhausted(&format!(
            "{{% set n = namespace(v={start}) %}}{{% for i in range(60) %}}{step}{{% endfor %}}\
             {{{{ n.v | tojson }}}}"
        ));
    }
    let text = "x".repeat(10_000);
    check_exhausted(&format!("{{% for a in range(100000) %}}{text}{{% endfor %}}"));
    check_exhausted(&format!(
        "{{% set s %}}{{% for a in range(100000) %}}{text}{{% endfor %}}{{% endset %}}"
    ));
}

/// Tests run on threads with 2 MiB of stack, as servers do.
#[test]
fn templates_that_take_the_stack_are_stopped() {
    let around = |open: &str, times: usize, middle: &str, close: &str| {
        format!("{}{middle}{}", open.repeat(times), close.repeat(times))
    };
    let deep = |step: &str| {
        format!(
            "{{% set n = namespace(v=[1]) %}}{{% for i in range(100000) %}}{step}{{% endfor %}}\
             {{{{ n.v }}}}{{{{ 1 / 0 }}}}"
        )
    };
    let expression = |inside: String| format!("{{{{ {inside} }}}}");
    let sources = [
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}".to_owned(),
        "{% set n = namespace() %}{% set n.n = [{'a': n}] %}{{ n }}".to_owned(),
        deep("{% set n.v = [n.v] %}"),
        deep("{% set n.v = dict(a=n.v) %}"),
        deep("{% set n.v = n.v | reverse %}"),
        deep("{% set n.v = n.v + [n.v] %}"),
        expression(around("(", 5000, "1", ")")),
        expression(around("[", 5000, "1", "]")),
        expression("-".repeat(5000) + "1"),
        expression("not ".repeat(5000) + "1"),
        expression("1".to_owned() + &"+1".repeat(50_000)),
        expression("a".to_owned() + &"~a".repeat(50_000)),
        expression("a".to_owned() + &".a".repeat(50_000)),
        expression("a".to_owned() + &"|string".repeat(20_000)),
        expression("a".to_owned() + &" if a".repeat(20_000)),
        expression("a if a else ".repeat(10_000) + "a"),
        expression("'a' * 9999".to_owned() + &" * 9999".repeat(300)),
        expression("'a' * 90000000 ~ ".repeat(300) + "a"),
        around("{% if a %}", 10_000, "", "{% endif %}"),
        around("{% set a %}", 10_000, "", "{% endset %}"),
        around("{% for a in b %}", 10_000, "", "{% endfor %}"),
        "{% if a %}".to_owned() + &"{% elif a %}".repeat(10_000) + "{% endif %}",
        "{% set a = [] %}".to_owned() + &"{% set a = [a] %}".repeat(10_000) + "{{ a }}",
        "a".repeat(limits::MAX_SOURCE_BYTES + 1),
    ];
    sources.iter().for_each(|source| check_stopped(source));
}

/// As deep as the limits allow, on a thread with 2 MiB of stack.
#[test]
fn the_deepest_template_allowed_fits_the_stack() {
    let nested = |times: usize| {
        format!("{}{}{}", "{% if 1 %}".repeat(times), "{{ 1 }}", "{% endif %}".repeat(times))
    };
    check(&nested(90), "1");
    check(&format!("{{{{ {}1{} }}}}", "(".repeat(45), ")".repeat(45)), "1");
    check(&format!("{{{{ 1{} }}}}", "+1".repeat(390)), "391");
    check(&format!("{{{{ 'a'{} }}}}", "~'a'".repeat(390)), &"a".repeat(391));
}

#[test]
fn a_long_conversation_is_within_the_limits() {
    let turn = |at: usize| {
        let role = if at.is_multiple_of(2) { "user" } else { "assistant" };
        json!({"role": role, "content": "word ".repeat(400)})
    };
    let input = ChatInput {
        messages: (0..2000).map(turn).collect(),
        tools: Some(
            (0..50).map(|at| json!({"name": at, "parameters": {"a": [1, 2, 3]}})).collect(),
        ),
        ..conversation()
    };
    let source = "{% set ns = namespace(last=0) %}{% for t in tools %}{{ t | tojson }}{% endfor %}\
        {% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}\
        {{ raise_exception('order') }}{% endif %}{% set ns.last = loop.index0 %}\
        {% if '</think>' in m.content %}{{ m.content.split('</think>')[-1].lstrip('\n') }}\
        {% else %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' }}{% endif %}\
        {% if loop.last and messages | length > 1 %}{{ ns.last }}{% endif %}{% endfor %}";
    let text = render_with(source, &input);
    assert!(text.as_ref().is_ok_and(|text| text.len() > 4_000_000), "{:?}", text.map(|t| t.len()));
}
