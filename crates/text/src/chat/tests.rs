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

/// All of these would take the machine's time, memory or stack.
#[test]
fn hostile_templates_are_stopped() {
    let repeat = |text: &str, times: usize| text.repeat(times);
    let sources = [
        // Time.
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}".into(),
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}".into(),
        "{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}".into(),
        "{% block b %}{{ self.b() }}{% endblock %}".into(),
        "{% set s = 'ab' * 2000000 %}{% for a in range(100000) %}{% if s == s ~ '' %}{% endif %}\
         {% endfor %}".into(),
        "{% set s = 'ab' * 2000000 %}{% for a in range(100000) %}{{ s | length }}{% endfor %}".into(),
        "{% set s = 'ab' * 2000000 %}{% for a in range(100000) %}{{ 'ba!' in s }}{% endfor %}".into(),
        "{% set s = 'ab' * 2000000 %}{% for a in range(100000) %}{{ s[-1] }}{% endfor %}".into(),
        "{% set s = 'ab' * 2000000 %}{% for a in range(100000) %}{{ s[-2:] }}{% endfor %}".into(),
        "{% set s = 'ab' * 2000000 %}{% for a in range(100000) %}{{ s.count('b') }}{% endfor %}".into(),
        "{% set l = range(90000) | list %}{% for a in range(100000) %}{{ l == l[0:] }}{% endfor %}".into(),
        "{% set l = range(90000) | list %}{% for a in range(100000) %}{{ (l | sort)[0] }}{% endfor %}".into(),
        "{% set l = range(90000) | list %}{{ l | select('in', l) | list | length }}".into(),
        "{% for x in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}".into(),
        // Memory.
        "{{ 'a' * 1000000000 }}".into(),
        "{{ 'a' * 10 ** 9 }}".into(),
        "{{ ['a'] * 1000000000 }}".into(),
        "{{ (1, 2) * 90000000 }}".into(),
        "{% set n = 90000000 %}{{ (1, 2) * n }}{{ [0] * n }}".into(),
        "{% set n = 100000000 %}{{ 'a' * n }}".into(),
        "{{ range(1000000000) }}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s * 9 %}{% endfor %}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s.replace('b', 'bb' * 9) %}\
         {% endfor %}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s | replace('', 'b') %}\
         {% endfor %}".into(),
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = n.l + n.l %}{% endfor %}".into(),
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = [n.l, n.l] %}{% endfor %}\
         {{ n.l }}".into(),
        "{% set n = namespace(l=[1]) %}{% for i in range(60) %}{% set n.l = {'a': n.l, 'b': n.l} %}\
         {% endfor %}{{ n.l | tojson }}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set s %}{{ n.s }}{{ n.s }}{% endset %}\
         {% set n.s = s %}{% endfor %}".into(),
        "{% macro d(s) %}{{ s }}{{ s }}{% endmacro %}{% set n = namespace(s='ab') %}\
         {% for i in range(60) %}{% set n.s = d(n.s) %}{% endfor %}".into(),
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}\
         {% set n.s = ((n.s ~ ',') * 9).split(',') | join(n.s) %}{% endfor %}".into(),
        format!("{{% for a in range(100000) %}}{}{{% endfor %}}", repeat("x", 10_000)),
        format!("{{% set s %}}{{% for a in range(100000) %}}{}{{% endfor %}}{{% endset %}}", repeat("x", 10_000)),
        "{{ '%999999999d' | format(1) }}".into(),
        "{{ '{:999999999}'.format(1) }}".into(),
        "{{ [1] | tojson(indent=1000000000) }}".into(),
        "{{ 'a\\nb' | indent(1000000000) }}".into(),
        "{% for a in range(100000) %}{{ ('a' * 8000000).split('a') | length }}{% endfor %}".into(),
        "{{ ('a' * 8000000) | list | length }}".into(),
        "{% for c in 'a' * 8000000 %}{% endfor %}".into(),
        "{% set s = 'a' * 8000000 %}{{ [s] * 100 }}".into(),
        "{% set s = 'a' * 4000000 %}{{ [s, s, s, s, s, s] | upper }}".into(),
        // Stack.
        "{% set n = namespace() %}{% set n.n = n %}{{ n }}".into(),
        "{% set n = namespace() %}{% set n.n = [{'a': n}] %}{{ n }}".into(),
        "{% set n = namespace(l=[]) %}{% for i in range(100000) %}{% set n.l = [n.l] %}{% endfor %}".into(),
        "{% set n = namespace(l={}) %}{% for i in range(100000) %}{% set n.l = dict(a=n.l) %}{% endfor %}".into(),
        "{% set n = namespace(l=[1]) %}{% for i in range(100000) %}{% set n.l = n.l | reverse %}\
         {% endfor %}{{ n.l }}{{ 1 / 0 }}".into(),
        format!("{{{{ {}1{} }}}}", repeat("(", 5000), repeat(")", 5000)),
        format!("{{{{ {}1{} }}}}", repeat("[", 5000), repeat("]", 5000)),
        format!("{{{{ {}1 }}}}", repeat("-", 5000)),
        format!("{{{{ {}1 }}}}", repeat("not ", 5000)),
        format!("{{{{ 1{} }}}}", repeat("+1", 50_000)),
        format!("{{{{ a{} }}}}", repeat("~a", 50_000)),
        format!("{{{{ a{} }}}}", repeat(".a", 50_000)),
        format!("{{{{ a{} }}}}", repeat("|string", 20_000)),
        format!("{{{{ a{} }}}}", repeat(" if a", 20_000)),
        format!("{{{{ {} a }}}}", repeat("a if a else ", 10_000)),
        format!("{}{}", repeat("{% if a %}", 10_000), repeat("{% endif %}", 10_000)),
        format!("{{% if a %}}{}{{% endif %}}", repeat("{% elif a %}", 10_000)),
        format!("{}{}", repeat("{% set a %}", 10_000), repeat("{% endset %}", 10_000)),
        format!("{}{}", repeat("{% for a in b %}", 10_000), repeat("{% endfor %}", 10_000)),
        repeat("a", limits::MAX_SOURCE_BYTES + 1),
        format!("{{% set a = [] %}}{}{{{{ a }}}}", repeat("{% set a = [a] %}", 10_000)),
        format!("{{{{ 'a' * 9999 {} }}}}", repeat("* 9999", 300)),
        format!("{{{{ {}'a' * 90000000 }}}}", repeat("'a' * 90000000 ~", 300)),
    ];
    for source in sources {
        let label: String = source.chars().take(120).collect();
        let result = render(&source);
        let stopped = matches!(
            result,
            Err(TextError::Exhausted(_) | TextError::Template(_) | TextError::Render(_))
        );
        let shown = result.map(|text| text.len());
        assert!(stopped, "{label}: {shown:?}");
    }
}

#[test]
fn a_long_conversation_is_within_the_limits() {
    let turn = |at: usize| json!({"role": if at.is_multiple_of(2) { "user" } else { "assistant" }, "content": "word ".repeat(400)});
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
