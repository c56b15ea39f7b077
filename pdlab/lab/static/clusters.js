import { api, el, main, tell } from "./lab.js";

main.append(el("h1", {}, "Clusters"));
api("/clusters").then((found) => main.append(found.length
  ? el("ul", {}, found.map((one) => el("li", {}, el("a", { href: `/clusters/${encodeURIComponent(one.name)}` }, one.name), " ", el("span", { class: "soft" }, one.url))))
  : el("p", {}, "This lab watches none. Start it with ", el("code", {}, "pdlab lab --router http://HOST:PORT"), " or ", el("code", {}, "--registry etcd://HOST:PORT"), "."))).catch(tell);
