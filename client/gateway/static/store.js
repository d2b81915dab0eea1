// Conversations, kept in this browser's IndexedDB. A browser that refuses it (private windows of
// some) gets a store that lasts as long as the page.

const NAME = "tokenbus";

function open() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("talks", { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

const memory = new Map();
let database = null;
const ready = open().then(
  (found) => (database = found),
  () => null,
);

async function transact(mode, action) {
  await ready;
  if (!database) return undefined;
  return new Promise((resolve, reject) => {
    const request = action(database.transaction("talks", mode).objectStore("talks"));
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

/** All conversations, the latest first. */
export async function all() {
  const found = (await transact("readonly", (talks) => talks.getAll())) ?? [...memory.values()];
  return found.sort((a, b) => b.updated - a.updated);
}

/** Keep a conversation as it is now. */
export async function put(talk) {
  memory.set(talk.id, talk);
  await transact("readwrite", (talks) => talks.put(structuredClone(talk)));
}

/** Forget a conversation. */
export async function remove(id) {
  memory.delete(id);
  await transact("readwrite", (talks) => talks.delete(id));
}
