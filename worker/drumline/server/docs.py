"""The page behind ``/docs``: lists the operations of ``/openapi.json`` and tries them. Needs no other file or host."""

from __future__ import annotations

import base64
import hashlib
import html

_STYLE = """
:root{color-scheme:light dark;font:16px/1.5 system-ui,sans-serif}body{max-width:60rem;margin:2rem auto;padding:0 1rem}
details{border:1px solid #8886;border-radius:.5rem;margin:.6rem 0;padding:.5rem .9rem}summary{cursor:pointer}
b.m{display:inline-block;min-width:3.4rem;font-family:monospace}code,pre,textarea{font:14px/1.45 ui-monospace,monospace}
pre{overflow:auto;max-height:24rem;background:#8881;padding:.6rem;border-radius:.4rem;white-space:pre-wrap;
word-break:break-word}textarea,input{width:100%;box-sizing:border-box}button{margin:.5rem 0;padding:.3rem 1rem}
img{max-width:100%;max-height:20rem;margin:.3rem}small{opacity:.75}
"""

_SCRIPT = """
"use strict";
const el=(tag,props={},...kids)=>{const e=Object.assign(document.createElement(tag),props);e.append(...kids);return e};
let spec;
const follow=s=>{while(s&&s.$ref)s=s.$ref.split("/").slice(1).reduce((o,k)=>o&&o[k],spec);return s||{}};
const sample=(schema,depth=0)=>{const s=follow(schema);if(depth>6)return null;
  if("default" in s)return s.default;if("const" in s)return s.const;if(s.enum)return s.enum[0];
  if(s.examples&&s.examples.length)return s.examples[0];
  const any=s.anyOf||s.oneOf;if(any)return sample(any[0],depth+1);
  const t=Array.isArray(s.type)?s.type[0]:s.type;
  if(t==="object"||s.properties){const o={};for(const[k,v]of Object.entries(s.properties||{}))
    if((s.required||[]).includes(k)||"default" in follow(v))o[k]=sample(v,depth+1);return o}
  return{string:"",integer:s.minimum||0,number:s.minimum||0,boolean:false,array:[]}[t]??null};
const images=(value,into)=>{if(Array.isArray(value))value.forEach(v=>images(v,into));
  else if(value&&typeof value==="object"){
    if(typeof value.url==="string"&&value.url.startsWith("data:image/"))into.append(el("img",{src:value.url}));
    else Object.values(value).forEach(v=>images(v,into))}};
const shorten=value=>JSON.stringify(value,(k,v)=>typeof v==="string"&&v.length>400?v.slice(0,400)+"...":v,2);
const show=(text,pre,pictures)=>{let value;
  try{value=JSON.parse(text)}catch{pre.textContent+=text.slice(0,20000)+"\\n";return}
  pre.textContent+=shorten(value)+"\\n";images(value,pictures)};
async function send(method,path,body,pre,pictures){
  pre.textContent="";pictures.replaceChildren();
  const headers={},key=document.getElementById("key").value;
  if(key)headers["X-API-Key"]=key;if(body!==null)headers["Content-Type"]="application/json";
  const started=performance.now();
  const answer=await fetch(path,{method,headers,body});
  pre.textContent=`${answer.status} ${answer.headers.get("x-request-id")||""}\\n`;
  if(!(answer.headers.get("content-type")||"").startsWith("text/event-stream"))show(await answer.text(),pre,pictures);
  else{const reader=answer.body.pipeThrough(new TextDecoderStream()).getReader();let rest="";
    for(;;){const{done,value}=await reader.read();if(done)break;
      const blocks=(rest+value).split("\\n\\n");rest=blocks.pop();
      for(const block of blocks){const lines=block.split("\\n"),name=lines.find(l=>l.startsWith("event: "));
        if(!name)continue;pre.textContent+=name.slice(7)+" ";
        show(lines.filter(l=>l.startsWith("data: ")).map(l=>l.slice(6)).join("\\n"),pre,pictures)}}}
  pre.textContent+=`(${Math.round(performance.now()-started)} ms)`}
function operation(path,method,op){
  const box=el("details",{},el("summary",{},el("b",{className:"m",textContent:method.toUpperCase()}),
    el("code",{textContent:path})," ",el("small",{textContent:op.summary||""})));
  if(op.description)box.append(el("p",{textContent:op.description}));
  const inputs={};
  for(const p of op.parameters||[])if(p.in!=="header"){const known=follow(p.schema).enum;
    inputs[p.name]=el("input",{placeholder:p.name,value:known?known[0]:""});
    box.append(el("label",{},`${p.name} (${p.in}) `,el("small",{textContent:p.description||""}),inputs[p.name]))}
  const schema=op.requestBody&&op.requestBody.content&&(op.requestBody.content["application/json"]||{}).schema;
  let area=null;
  if(schema){area=el("textarea",{rows:8,value:JSON.stringify(sample(schema),null,2)});
    box.append(area,el("details",{},el("summary",{textContent:"schema"}),
      el("pre",{textContent:JSON.stringify(follow(schema),null,2)})))}
  const pre=el("pre"),pictures=el("div"),go=el("button",{textContent:"Send"});
  go.onclick=async()=>{go.disabled=true;
    try{let url=path;const query=new URLSearchParams();
      for(const p of op.parameters||[])if(inputs[p.name]&&inputs[p.name].value){
        if(p.in==="path")url=url.replace(`{${p.name}}`,encodeURIComponent(inputs[p.name].value));
        else query.set(p.name,inputs[p.name].value)}
      await send(method.toUpperCase(),url+(query.size?"?"+query:""),area?area.value:null,pre,pictures)}
    catch(error){pre.textContent=String(error)}finally{go.disabled=false}};
  const answers=Object.entries(op.responses||{}).map(([s,r])=>`${s}: ${r.description||""}`).join("\\n");
  box.append(go,pre,pictures,el("details",{},el("summary",{textContent:"answers"}),el("pre",{textContent:answers})));
  return box}
async function load(){
  const key=document.getElementById("key").value,list=document.getElementById("operations");
  const answer=await fetch("/openapi.json",key?{headers:{"X-API-Key":key}}:{});
  if(!answer.ok){list.textContent="Enter an API key, then leave the field.";return}
  spec=await answer.json();list.replaceChildren();
  document.getElementById("about").textContent=spec.info.description||"";
  const rank=path=>path==="/"||path==="/stream"?0:path.startsWith("/{")?2:1;
  for(const path of Object.keys(spec.paths).sort((a,b)=>rank(a)-rank(b)))
    for(const[method,op]of Object.entries(spec.paths[path]))list.append(operation(path,method,op))}
document.getElementById("key").onchange=load;load();
"""

_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>%(title)s</title><style>%(style)s</style>
<h1>%(title)s</h1><p id="about"></p>
<label>API key, if the server wants one <input id="key" type="password" autocomplete="off"></label>
<div id="operations">Loading...</div><p><a href="/openapi.json">openapi.json</a></p><script>%(script)s</script></html>
"""


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


#: Only this page's own script and style run, and it talks to nobody but this server.
HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src 'sha256-{_digest(_SCRIPT)}'; style-src 'sha256-{_digest(_STYLE)}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
}


def page(title: str) -> str:
    """Return the page for an app called ``title``."""
    return _PAGE % {"title": html.escape(title), "style": _STYLE, "script": _SCRIPT}
