"""Outputs as model families write them, and what each means: (parser, text, content, [(name, arguments)])."""

DS = {name: f"<｜tool▁{name}｜>" for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep")}


def ds_v3(name, arguments):
    return f"{DS['call▁begin']}function{DS['sep']}{name}\n```json\n{arguments}\n```{DS['call▁end']}"


def ds_v31(name, arguments):
    return f"{DS['call▁begin']}{name}{DS['sep']}{arguments}{DS['call▁end']}"


NAMES = {"f", "get_weather", "now", "search"}
NESTED = '{"q": "a \\"}{\\" <b>", "deep": {"x": [1, {"y": []}]}, "u": "\\u00e9日\\\\"}'

CALLS = [
    # hermes
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', None, [("f", '{"a": 1}')]),
    (
        "hermes",
        'Let me look.\n<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>{"name": "now"}</tool_call>\n',
        "Let me look.",
        [("f", "{}"), ("now", "{}")],
    ),
    ("hermes", f'<tool_call>{{"arguments": {NESTED}, "name": "f"}}</tool_call> Done.', " Done.", [("f", NESTED)]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {NESTED}}}', None, [("f", NESTED)]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud83d\\ude00\\"}"}</tool_call>',
        None,
        [("f", '{"a": "😀"}')],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "cut', None, [("f", '{"a": "cut')]),
    (
        "hermes",
        '<tool_call>{"name": "f", "arguments": null}<tool_call>{"name": "now", "arguments": {}}',
        None,
        [("f", "{}"), ("now", "{}")],
    ),
    (
        "hermes",
        '<tool_call>{"name": "f", "id": [1, "}"], "arguments": {"a": 1}, "x": 2}</tool_call>',
        None,
        [("f", '{"a": 1}')],
    ),
    ("hermes", "plain text, a < b and <tool_calls> too \n", "plain text, a < b and <tool_calls> too \n", []),
    ("hermes", "<tool_call>not json</tool_call>", "<tool_call>not json</tool_call>", []),
    ("hermes", '<tool_call>{"nam": "f"}</tool_call>', '<tool_call>{"nam": "f"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f"', '<tool_call>{"name": "f"', []),
    ("hermes", "ends in <tool_ca", "ends in <tool_ca", []),
    ("hermes", "", None, []),
    ("hermes", " \n", " \n", []),
    # llama3_json
    ("llama3_json", '{"name": "f", "parameters": {"a": 1}}', None, [("f", '{"a": 1}')]),
    (
        "llama3_json",
        '<|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "now", "parameters": {}}',
        None,
        [("f", '{"a": 1}'), ("now", "{}")],
    ),
    ("llama3_json", 'So: <|python_tag|>{"type": "function", "name": "f", "parameters": {}}', "So:", [("f", "{}")]),
    ("llama3_json", '\n{"parameters": {"a": "x"}, "name": "f"}', None, [("f", '{"a": "x"}')]),
    ("llama3_json", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', []),
    ("llama3_json", '{"name": "unknown", "parameters": {"a": 1}}', '{"name": "unknown", "parameters": {"a": 1}}', []),
    ("llama3_json", '  {"a": [1, 2', '  {"a": [1, 2', []),
    ("llama3_json", 'Text then {"name": "f", "parameters": {}}', 'Text then {"name": "f", "parameters": {}}', []),
    ("llama3_json", '{"name": "f", "parameters": {}} and more', " and more", [("f", "{}")]),
    # mistral
    ("mistral", '[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}}]', None, [("f", '{"a": 1}')]),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"arguments": {"b": [2]}, "name": "now"}]',
        None,
        [("f", "{}"), ("now", '{"b": [2]}')],
    ),
    ("mistral", 'Sure.[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]now[ARGS]{}', "Sure.", [("f", '{"a": 1}'), ("now", "{}")]),
    ("mistral", '[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": "]"}', None, [("f", '{"a": "]"}')]),
    ("mistral", "[TOOL_CALLS]oops", "[TOOL_CALLS]oops", []),
    ("mistral", "[TOOL_CALLS][", "[TOOL_CALLS][", []),
    ("mistral", "[TOOL_CALLS][ ]", "[TOOL_CALLS][ ]", []),
    ("mistral", "an array [1, 2] and [TOOL_CALL", "an array [1, 2] and [TOOL_CALL", []),
    # deepseek
    (
        "deepseek_v3",
        f"{DS['calls▁begin']}{ds_v3('f', NESTED)}\n{ds_v3('now', '{}')}{DS['calls▁end']}",
        None,
        [("f", NESTED), ("now", "{}")],
    ),
    (
        "deepseek_v3",
        f"Looking.{DS['calls▁begin']}{ds_v31('f', '{}')}{ds_v31('now', NESTED)}{DS['calls▁end']}ok",
        "Looking.ok",
        [("f", "{}"), ("now", NESTED)],
    ),
    (
        "deepseek_v3",
        f'{DS["calls▁begin"]}{DS["call▁begin"]}function{DS["sep"]}f\n```json\n{{"a"',
        None,
        [("f", '{"a"')],
    ),
    ("deepseek_v3", f"{DS['calls▁begin']}nothing", f"{DS['calls▁begin']}nothing", []),
    ("deepseek_v3", DS["calls▁begin"] + DS["calls▁end"], DS["calls▁begin"] + DS["calls▁end"], []),
    ("deepseek_v3", "a <｜tool▁calls▁be", "a <｜tool▁calls▁be", []),
    # pythonic
    ("pythonic", "[f(a=1)]", None, [("f", '{"a": 1}')]),
    (
        "pythonic",
        "[f(), now( ), get_weather(city='Oslo', days=3)]",
        None,
        [("f", "{}"), ("now", "{}"), ("get_weather", '{"city": "Oslo", "days": 3}')],
    ),
    (
        "pythonic",
        "[f(a=[1, -2.5, 1e3,], b={'k': (True, None), 2: \"it's\"}, c='say \\\"hi\\\"\\n\\x41\\u00e9', d=.5, e=1_000,)]",
        None,
        [
            (
                "f",
                '{"a": [1, -2.5, 1e3], "b": {"k": [true, null], "2": "it\'s"}, '
                '"c": "say \\"hi\\"\\nAé", "d": 0.5, "e": 1000}',
            )
        ],
    ),
    ("pythonic", "<|python_start|>[now()]<|python_end|>", None, [("now", "{}")]),
    ("pythonic", "[f(a=[[[]]], b={}, c=[{}, []])]", None, [("f", '{"a": [[[]]], "b": {}, "c": [{}, []]}')]),
    ("pythonic", "[f(a='cut", None, [("f", '{"a": "cut')]),
    ("pythonic", "[f(a=__import__('os').system('x'))]", "('os').system('x'))]", [("f", '{"a": ')]),
    ("pythonic", "[1, 2, 3]", "[1, 2, 3]", []),
    ("pythonic", "[unknown(a=1)]", "[unknown(a=1)]", []),
    ("pythonic", "[]", "[]", []),
    ("pythonic", "text [f()]", "text [f()]", []),
    ("pythonic", "[f(a=1), unknown(b=2)]", ", unknown(b=2)]", [("f", '{"a": 1}')]),
]

# (parser, does the output begin inside the block, text, reasoning, content)
REASONED = [
    ("qwen3", False, "<think>\nso\nit is\n</think>\n\nYes.", "so\nit is", "Yes."),
    ("qwen3", False, "Yes. <think>no</think>", None, "Yes. <think>no</think>"),
    ("qwen3", True, "so </th </think>Yes", "so </th", "Yes"),
    ("qwen3", True, "<think>so</think>Yes", "so", "Yes"),
    ("qwen3", False, "<think>\n\n</think>\n\nYes", None, "Yes"),
    ("qwen3", False, " <think>cut", "cut", None),
    ("qwen3", False, "<thinking", None, "<thinking"),
    ("qwen3", False, "", None, None),
    ("deepseek_r1", True, "\nfirst\n\nthen</think>\nDone", "first\n\nthen", "Done"),
    ("deepseek_r1", True, "never ends", "never ends", None),
    ("deepseek_r1", True, "a</think>b</think>c", "a", "b</think>c"),
]
