import asyncio, json, re
REPLY = json.dumps({"choices": [{"message": {"role": "assistant", "content": '{"NAME": true}'}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
class P(asyncio.Protocol):
    def connection_made(self, t): self.t=t; self.buf=b""
    def data_received(self, d):
        self.buf+=d
        while True:
            i=self.buf.find(b"\r\n\r\n")
            if i<0: return
            n=int(re.search(rb"(?i)content-length: (\d+)", self.buf[:i])[1])
            if len(self.buf)<i+4+n: return
            body=self.buf[i+4:i+4+n]; self.buf=self.buf[i+4+n:]
            name=re.search(rb'"required": \["(criterion_\d+)"', body)[1].decode()
            out=REPLY.replace("NAME",name).encode()
            asyncio.get_running_loop().call_later(0.05, self.t.write, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"%len(out)+out)
async def main():
    s=await asyncio.get_running_loop().create_server(P,"127.0.0.1",0)
    print(f"http://127.0.0.1:{s.sockets[0].getsockname()[1]}/v1",flush=True); await s.serve_forever()
asyncio.run(main())
