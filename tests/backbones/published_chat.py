"""Chat templates in the forms that published models use, over the tiny tokenizer's special tokens."""

from __future__ import annotations

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN2_VL = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in content %}"
    f"{PICTURE}{{% elif 'text' in content %}}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<|image_pad|>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
IMAGES = "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image_pad|>\n' }}"
TEXTS = "{% endfor %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
LLAVA_NEXT_VICUNA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'][0]['text'] }}{% else %}"
    "{{ message['role'].upper() + ': '}}{% endif %}" + IMAGES + TEXTS + "{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
LLAVA_NEXT_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}" + IMAGES + TEXTS
    + "{{ content['text'] }}{% endfor %}{{' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'][0]['text'] + '<\\\\s> '}}{% endif %}{% endfor %}"
)  # fmt: skip
LLAVA_ONEVISION = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<|image_pad|>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\n' + content['text'] }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}\n{%- for message in messages -%}{%- if message['role'] == 'assistant' -%}"
    "{%- set role = 'model' -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}{{ '<boi>' + role + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
    "{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<|image_pad|>' }}{%- else -%}"
    "{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<eoi>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<boi>model\n' }}{%- endif -%}"
)
GEMMA3_WITH_SYSTEM = (
    "{{ bos_token }}\n{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set before = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set before = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}{%- set talk = messages[1:] -%}"
    "{%- else -%}{%- set before = '' -%}{%- set talk = messages -%}{%- endif -%}{%- for message in talk -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}"
    "{%- endif -%}{{ '<boi>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ before if loop.first else '' }}{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- else -%}{%- for item in message['content'] -%}{%- if item['type'] == 'image' -%}{{ '<|image_pad|>' }}"
    "{%- else -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    "{{ '<eoi>\n' }}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<boi>model\n' }}{%- endif -%}"
)
"""The system's words before those of the first question."""
GLM = (
    "<s>{% for m in messages %}{% if m.role == 'system' %}<|system|>\n{{ m.content }}{% elif m.role == 'user' %}"
    "<boi>user\n{% if m.content is string %}{{ m.content }}{% else %}{% for item in m.content %}"
    "{% if item.type == 'image' %}<|image_pad|>{% elif item.type == 'text' %}{{ item.text }}{% endif %}{% endfor %}"
    "{% endif %}{% else %}<boi>assistant\n{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<boi>assistant\n{% endif %}"
)
"""As GLM-4.1V's: what the system and the assistant say is written as it stands, so a list of parts as Python's text."""
PIXTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content[0].text %}{% set talk = messages[1:] %}"
    "{% else %}{% set talk = messages %}{% endif %}<s>{% for m in talk %}{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}{% for item in m.content %}"
    "{% if item.type == 'image' %}<|image_pad|>{% else %}{{ item.text }}{% endif %}{% endfor %}[/INST]"
    "{% else %}{% for item in m.content %}{{ item.text }}{% endfor %}</s>{% endif %}{% endfor %}"
)
"""The system's words are in the last question, and only where no answer follows it."""
LLAMA3 = (
    "<s>{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n\n' + message['content'] | trim }}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
)
"""A language model's, whose filter makes a text of a list."""
