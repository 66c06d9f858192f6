"""What the events of llama-server's streams look like, byte for byte; facts as read in its server-task.cpp."""

from __future__ import annotations

import re

# Single excluded bytes ([^"]) are scanned much faster than sets ([^{}]) or lazy repeats.
_STRING = rb'[^"\\]*(?:\\.[^"\\]*)*'
_TOLD = rb'"tokens":\[(\d*)\],"stop":false,"id_slot":-?\d+,"tokens_predicted":([1-9]\d*),"tokens_evaluated":(\d+)'
TEXT_START = b',"__verbose":{'
TEXT_EVENT = re.compile(rb',"__verbose":\{"index":0,"content":"(%b)",%b\}' % (_STRING, _TOLD))
NATIVE_EVENT = re.compile(rb'data: \{"index":0,"content":"(%b)",%b' % (_STRING, _TOLD))
_PROB = rb'\{"id":%b,"token":"%b","bytes":\[[^]]*\],"prob":[^,}]+'
CHAT_START = b'"delta":{"content":"'
CHAT_ID = b'"},"logprobs":{"content":[{"id":'
CHAT_EVENT = re.compile(
    rb'("delta":\{"content":"(%b)"\}),"logprobs":\{"content":\[%b,"top_probs":\[%b\}\]\}\]\}'
    rb'(\}\],"created":\d+,"id":"[^"]*","model":"%b","system_fingerprint":"[^"]*","object":"[^"]*")'
    rb'(,"timings":\{"cache_n":\d+,"prompt_n":\d+,"prompt_ms":[^,]+,"prompt_per_token_ms":[^,]+,'
    rb'"prompt_per_second":[^,]+,"predicted_n":(\d+),[^}]*\})'
    % (_STRING, _PROB % (rb"(\d+)", rb"(%b)" % _STRING), _PROB % (rb"\d+", _STRING), _STRING)
)
BARE_CONTENT = re.compile(rb'\{"content":"(%b)"\}\}\],"created":' % _STRING)
REASON = b'"finish_reason":"'
BARE_END = b'data: {"choices":[{"finish_reason":"'
BARE_COUNTS = b'data: {"choices":[],'
BARE_START = re.compile(
    rb'data: \{"choices":\[\{"finish_reason":null,"index":0,"delta":'
    rb'\{"role":"assistant","content":(?:null|"(%b)")\}\}\],"created":' % _STRING
)
